#!/bin/bash
# Trains on the flowers with two workers on this machine's loopback: make cluster-demo.
# Usage: demo.sh PYTHON LOG_DIR; PORT and PORT + 1 must be free.

python=$1 log_dir=$2 port=${PORT:-22220}
mkdir -p "$log_dir"
pids=()
trap 'kill "${pids[@]}" 2>/dev/null' EXIT
for index in 0 1; do
  TF_CONFIG="{\"cluster\": {\"worker\": [\"127.0.0.1:$port\", \"127.0.0.1:$((port + 1))\"]},
    \"task\": {\"type\": \"worker\", \"index\": $index}}" \
  "$python" train_flowers.py --dataset_dir dataset --log_dir "$log_dir/run" --batch_size 16 \
    --image_size 96 --depth_multiplier 0.25 --num_epochs 8 --eval_every_epochs 4 \
    --log_every_n_steps 20 --startup_timeout_secs 120 --step_timeout_secs 60 \
    > "$log_dir/worker$index.txt" 2>&1 &
  pids+=($!)
done
echo "Two workers train for a minute or two; their output goes to $log_dir/worker*.txt"
code=0
for pid in "${pids[@]}"; do
  wait "$pid" || code=$?
done
for index in 0 1; do
  echo "--- the end of $log_dir/worker$index.txt"
  grep -E '^(Worker|global|validation|Saved|Ended|Stopped|Next|train_flowers|.*already)' \
    "$log_dir/worker$index.txt" | tail -n 6
done
exit $code
