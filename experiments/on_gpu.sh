#!/bin/sh
# Makes the language model's tables of docs/results.md on one GPU.
#
#     experiments/on_gpu.sh CURVES OUT
#
# Finished trainings are in CURVES, so that it may be stopped and started again. python3
# must have soap_optax[experiments] and JAX for the GPU. Several commands run at a time,
# because compiling takes longer than training, though it is done without autotuning.
set -e
mkdir -p "${1:?the folder of finished trainings is missing}"
mkdir -p "${2:?the folder of tables and plots is missing}"
curves=$(realpath "$1")
out=$(realpath "$2")
cd "$(dirname "$0")/.."
export XLA_FLAGS="--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
export JAX_COMPILATION_CACHE_DIR="${TMPDIR:-/tmp}/soap_optax_compiled"
mkdir -p "$out/two_lengths"

part() {
	to=$1
	shift
	python3 experiments/language_model.py --curves "$curves" --search-seeds 3 \
		--out "$to" --parts "$@" 2>"$to/$1.log"
}

part "$out" efficiency --lengths 300
{
	part "$out/two_lengths" efficiency --lengths 300 1200 \
		--optimizers NAdamW Muon SOAP SOAP-Muon &&
		part "$out/two_lengths" schedules
} &
running=$!
for name in frequency ablations batch_size widths; do
	part "$out" $name &
	running="$running $!"
done
part "$out" precisions --lengths 300 --seeds 6 &
running="$running $!"
failed=0
for process in $running; do
	wait "$process" || failed=1
done
[ $failed = 0 ] || echo "error: a part failed, see the logs in $out" >&2
exit $failed
