# Makes .venv from nothing and exports what DeepSpeed needs on CPU ranks; source it from the repository root.
# Quick when everything is in place: a stamp records for which requirements the environment was made.

for python in python3.11 python3.12 python3.13 python3.10 python3; do
    "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && break
    python=
done
if [ -z "$python" ]; then
    echo "Python 3.10 to 3.13 is needed and was not found" >&2
    return 1 2>/dev/null || exit 1
fi

[ -x .venv/bin/python ] || "$python" -m venv .venv
export VIRTUAL_ENV="$PWD/.venv" PATH="$PWD/.venv/bin:$PATH"
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TORCH_EXTENSIONS_DIR="$PWD/.venv/torch_extensions" PIP_DISABLE_PIP_VERSION_CHECK=1

stamp=.venv/requirements.stamp
wanted=$(cat constraints.txt setup.py scripts/setup_environment.sh | sha256sum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "setting up .venv (a few minutes the first time): build tools and torch"
    # torch first and pinned: DeepSpeed's own build imports it, and an unpinned torch would bring CUDA.
    pip install -q setuptools wheel ninja -c constraints.txt
    pip install -q torch -c constraints.txt
    echo "setting up .venv: the package, DeepSpeed and what the tests use"
    pip install -q --no-build-isolation -e ".[megatron,plots,test,dev]" -c constraints.txt
    # Beside the environment: botocore asks for another version of python-dateutil, and works with this one.
    pip install -q --no-deps --upgrade --target .venv/s3 -c constraints.txt s3fs aiobotocore aioitertools botocore boto3 \
        s3transfer jmespath moto flask flask-cors werkzeug blinker itsdangerous xmltodict responses cryptography cffi pycparser six
    echo "$wanted" > "$stamp"
fi

# DeepSpeed compiles its ops when they are first used. A build that was killed leaves a lock on which all later ones wait.
# Such a lock may also lie beside an op that was built before; no build takes ten minutes.
find "$TORCH_EXTENSIONS_DIR" -name lock -mmin +10 -delete 2>/dev/null || true
build_op() { # folder of the op, Python that loads it
    if ! ls "$TORCH_EXTENSIONS_DIR/$1"/*.so >/dev/null 2>&1; then
        echo "compiling $1 (once, about a minute)"
        rm -f "$TORCH_EXTENSIONS_DIR/$1/lock"
        python -c "$2" >.venv/build_op.log 2>&1 || { cat .venv/build_op.log >&2; return 1; }
    fi
}
build_op deepspeed_shm_comm "from deepspeed.comm.torch import build_shm_op; build_shm_op()"
