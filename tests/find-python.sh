#!/usr/bin/env bash
# Prints the Python to build with: the default one if it will do, else the newest that does.
set -u

complete='
import sys, os, sysconfig
assert sys.version_info >= (3, 11)
import venv, ensurepip
assert os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
'
fits='import sys; assert sys.version_info >= (3, 11); print("%d.%d" % sys.version_info[:2])'
incomplete=
for python in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 \
    /usr/bin/python3 /usr/bin/python3.13 /usr/bin/python3.12 /usr/bin/python3.11}; do
    command -v "$python" >/dev/null || continue
    if "$python" -c "$complete" 2>/dev/null; then
        command -v "$python"
        exit 0
    fi
    version=$("$python" -c "$fits" 2>/dev/null) && incomplete="$python (Python $version)"
done

if [ -n "$incomplete" ]; then
    echo "Ringside: $incomplete lacks venv or the C headers." \
        "On Debian or Ubuntu: apt install python3-venv python3-dev" >&2
else
    echo "Ringside needs Python 3.11 or later${PYTHON:+; PYTHON=$PYTHON is none}." \
        "On Debian or Ubuntu: apt install python3 python3-venv python3-dev" >&2
fi
exit 1
