#!/bin/sh
# Installs taktsight from the folder that this script lies in, without a network, as root:
#   ./install.sh                        the agent alone, or a newer version of it
#   ./install.sh cell7 --camera gige    and a station as a service: options as of `taktsight-agent install`
# PREFIX (/opt/taktsight) becomes a link to an environment beside it. The one before stays, and any that a station still
# runs from; to go back to one run the install.sh that it came with. PYTHON names an interpreter other than the system's.
set -eu
umask 022
cd "$(dirname "$(readlink -f "$0")")"
prefix=${PREFIX:-/opt/taktsight}

say() { echo "taktsight: $*"; }
stop() {
    say "$*" >&2
    exit 1
}

# Whether a process runs from an environment: its interpreter, or a library of it
is_used() {
    printf '%s/\n' "$1" "$(readlink -f "$1")" | grep -qsF -f - /proc/[0-9]*/cmdline /proc/[0-9]*/maps
}

sha256sum --check --strict --quiet SHA256SUMS || stop "files are damaged or missing: fetch the bundle again"

supported=$(cat PYTHONS)
python=
systems="/usr/bin/python3 /usr/bin/python3.14 /usr/bin/python3.13 /usr/bin/python3.12 /usr/bin/python3.11"
for candidate in ${PYTHON:-$systems}; do
    minor=$("$candidate" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    case " $supported " in *" $minor "*) python=$(readlink -f "$(command -v "$candidate")") && break ;; esac
done
[ -n "$python" ] || stop "found no Python of $supported: install one of these, or name it in PYTHON"
"$python" -I -c 'import venv' 2>/dev/null || stop "$python has no module venv: install the package python$minor-venv"

# The same packages for the same Python are the same environment: there is nothing to do twice
environment="$prefix-$(cat VERSION)-py$minor-$(sha256sum requirements.txt | cut -c1-8)"
if [ -e "$prefix" ] && [ ! -L "$prefix" ]; then
    stop "$prefix is a folder, a link was wanted: move it away (an environment of \`make install\`?) and run this again"
fi
if [ ! -e "$environment/complete" ]; then
    say "making $environment with $python $minor"
    rm -rf "$environment"
    "$python" -I -m venv --without-pip "$environment"
    for pip in wheels/pip-*.whl; do :; done
    export PIP_CONFIG_FILE=/dev/null PIP_ROOT_USER_ACTION=ignore
    PYTHONPATH="$PWD/$pip" "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir \
        --no-index --find-links wheels --require-hashes -r requirements.txt
    "$environment/bin/taktsight-agent" --version >/dev/null
    : >"$environment/complete"
fi

before=$(readlink "$prefix" || true)
if [ "$before" != "$environment" ]; then
    ln -sfn "$environment" "$prefix.new"
    mv -T "$prefix.new" "$prefix"
    hex='[0-9a-f]'
    for old in "$prefix"-[0-9]*-py[0-9]*-$hex$hex$hex$hex$hex$hex$hex$hex; do
        if [ "$old" = "$environment" ] || [ "$old" = "$before" ] || [ ! -e "$old/complete" ]; then continue; fi
        if is_used "$old"; then say "$old stays: a station runs from it"; else rm -rf "$old"; fi
    done
    say "$prefix is now $environment${before:+, before: $before}; a running station takes it over when it is restarted"
fi

[ "$#" -eq 0 ] || exec "$prefix/bin/taktsight-agent" install "$@" --prefix "$prefix"
