#!/bin/sh
# Everything that needs a GPU, in under ten minutes: the tests, the sanitizers on the kernels, and the measurements.
#
#     PYTHON=.venv/bin/python benchmarks/gpu_session.sh FOLDER
#
# Each step has a limit, and goes on after one that failed; what each printed is in FOLDER, with the results as JSON.
# The exit code is 1 where a step failed.
set -u
python=${PYTHON:-python}
out=${1:?"got no argument; name a folder for what the steps print"}
mkdir -p "$out"
failed=""

step() { # NAME SECONDS COMMAND...
  name=$1
  limit=$2
  shift 2
  start=$(date +%s)
  if timeout "$limit" "$@" >"$out/$name.txt" 2>&1 </dev/null; then result=passed; else
    result="failed ($?)"
    failed="$failed $name"
  fi
  echo "$name: $result, $(($(date +%s) - start)) s"
  tail -n 3 "$out/$name.txt" | sed 's/^/    /'
}

"$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || {
  echo "torch finds no GPU that it can use here: nothing was run" >&2
  exit 1
}
step tests 180 "$python" -m pytest -q -p no:cacheprovider tests/test_cuda.py tests/test_cuda_graphs.py
if command -v compute-sanitizer >/dev/null; then
  # Without torch's cache every tensor is an allocation of its own, so that a kernel that leaves it is seen.
  for tool in memcheck racecheck; do
    step $tool 70 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 1 \
      --target-processes application-only \
      "$python" -m pytest -q -p no:cacheprovider tests/test_cuda.py -k "test_every_operation and large and relu"
  done
else echo "memcheck, racecheck: left out, there is no compute-sanitizer here"; fi
step bench 130 "$python" -m batchnorm bench --device cuda --suite resnet --dtype bfloat16 --no-compile --json "$out/bench.json"
step small 50 "$python" -m batchnorm bench --device cuda --suite small --dtype float32 --no-compile --json "$out/small.json"
step resnet50 80 "$python" benchmarks/networks.py --device cuda --repeats 20
[ -z "$failed" ] || {
  echo "failed:$failed" >&2
  exit 1
}
