#!/usr/bin/env bash
# Train, sample and measure every run of a grid, then plot. Started again, it continues.
#
#   ./sweep.sh toy                the study in miniature: offline, CPU, 15 minutes on 2 cores
#   ./sweep.sh cifar10            one factor at a time, 14 runs (DDPM, unconditional)
#   ./sweep.sh paper              the same 14 with the study's rectified flow, class-conditional
#   ./sweep.sh full               the factorial of the same values, 320 runs
#   ./sweep.sh custom             your own N, WIDTH, BATCH, LR: one at a time, or DESIGN=full
#
#   ./sweep.sh GRID --dry-run     each run, its state, and the hours and disk that are left
#   ./sweep.sh GRID --dry-run --time      the same, timing the model sizes that never ran here
#   ./sweep.sh GRID --status      a table of the runs; `watch ./sweep.sh GRID --status`
#   ./sweep.sh GRID --list        the runs' names, the longest first
#   ./sweep.sh GRID --only NAME   one run; sbatch --array=0-13 sweep.sh GRID runs one a task
#
# Environment
#   GPUS    devices, a run at a time on each: "0 1 2 3"; "0 0" is two at a time on GPU 0; "cpu cpu"
#   OUT     folder of the runs (runs/GRID)
#   SEEDS   seeds, a run each ("0")
#   KEEP    weights that stay once a run is measured: all, last (the last ones) or none (all)
#   DATA    cifar10 (downloaded) or an .npz file; toy for toy
#   IMAGES  images that each run trains on (6400000; toy 40000)
#   N WIDTH BATCH LR        lists of values, the first of each the default
#   TRAIN SAMPLE MEASURE    more options for train.py, sample.py, measure.py
#   PYTHON  the interpreter (python)
set -euo pipefail

die() {
  echo "sweep.sh: $*" >&2
  exit 2
}

home=$(dirname "$0")
if [[ ! -f $home/train.py ]]; then home=${SLURM_SUBMIT_DIR:-$home}; fi  # Slurm runs a copy of this
[[ -f $home/train.py ]] || die "train.py is not beside this script, nor where sbatch was called"
cd "$home"

# --- One run: xargs calls `sweep.sh --guard "NAME N WIDTH BATCH LR SEED"`, SLOT set ---------------

stage() {               # run a script, its output to the log
  "$PYTHON" "$@" </dev/null >>"$OUT/logs/$name.log" 2>&1
}

train_options() {       # of the row n width batch lr seed, into the array `options`
  local more
  read -r -a more <<<"$TRAIN"
  options=(--data "$DATA" --n "$n" --width "$width" --batch "$batch" --lr "$lr" --seed "$seed"
    "${more[@]}")
}

run_one() {
  local name n width batch lr seed device devices more options
  read -r name n width batch lr seed <<<"$1"
  read -r -a devices <<<"$GPUS"
  device=${devices[$SLOT]}
  if [[ $device == cpu ]]; then
    export OMP_NUM_THREADS=$THREADS
  else
    export CUDA_VISIBLE_DEVICES=$device
    device=cuda
  fi
  echo "start  $name"
  train_options
  stage train.py "${options[@]}" --images "$IMAGES" --out "$OUT/$name" --device "$device" ||
    return 1
  read -r -a more <<<"$SAMPLE"
  stage sample.py "$OUT/$name" --device "$device" "${more[@]}" || return 1
  read -r -a more <<<"$MEASURE"
  stage measure.py "$OUT/$name" --device "$device" "${more[@]}" || return 1
  tidy "$name"
  echo "done   $name"
}

tidy() {                # remove the weights that KEEP does not keep, of the measured run $1
  local snapshots=("$OUT/$1"/snapshots/*.pt)
  case $KEEP in
  last) rm -f -- "${snapshots[@]:0:${#snapshots[@]}-1}" ;;
  none) rm -f -- "${snapshots[@]}" "$OUT/$1/last.pt" ;;
  esac
}

case ${1:-} in
--guard)                # xargs gives up when what it runs dies of a signal; an exit 1 it survives
  "$BASH" "$0" --run "$2" || exit 1
  exit
  ;;
--run)
  run_one "$2"
  exit
  ;;
esac

# --- The grid -------------------------------------------------------------------------------------

(($# >= 1)) || die "usage: ./sweep.sh toy|cifar10|paper|full|custom [--dry-run|--status|...]"
if [[ $1 == -h || $1 == --help ]]; then
  sed -n '2,/^set /s/^# \{0,1\}//p' "$0" && exit
fi
grid=$1 mode=${2:-} only=
case "$mode $#" in
" 1" | "--dry-run 2" | "--status 2" | "--list 2") ;;
"--dry-run 3") [[ $3 == --time ]] || die "$3: unknown option; --dry-run takes --time" ;;
"--only 3") only=$3 ;;
"--only "*) die "--only takes the name of one run; --list prints them" ;;
*) die "${*:2}: unknown option; there are --dry-run [--time], --status, --list and --only NAME" ;;
esac
timing=${3:-}
case $grid in
toy)
  DATA=toy
  N=${N:-16 8 32 512} WIDTH=${WIDTH:-32 8 16} BATCH=${BATCH:-16 8 32} LR=${LR:-1e-3 5e-4 2e-3}
  IMAGES=${IMAGES:-40000} GPUS=${GPUS:-$(seq "$(nproc)" | sed "s/.*/cpu/" | xargs)}
  TRAIN="--size 8 --mults 1 2 --blocks 1 --embed 128 --eval-images 512 ${TRAIN:-}"
  SAMPLE="--num 128 --sampling-steps 50 ${SAMPLE:-}"
  ;;
cifar10 | paper | full | custom)
  N=${N:-2048 4096 8192 16384} WIDTH=${WIDTH:-128 16 32 64 192} BATCH=${BATCH:-16 32 64 128}
  LR=${LR:-1e-4 1e-5 5e-5 4e-4}
  IMAGES=${IMAGES:-6400000}
  ;;
*) die "$grid: unknown grid; there are toy, cifar10, paper, full and custom" ;;
esac
if [[ $grid == paper ]]; then TRAIN="--process flow --conditional ${TRAIN:-}"; fi
if [[ $grid == full ]]; then DESIGN=full; fi
if [[ -z ${GPUS:-} && -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
  GPUS=${CUDA_VISIBLE_DEVICES//,/ }
elif [[ -z ${GPUS:-} ]]; then
  GPUS=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | xargs || true)
fi
GPUS=${GPUS:-cpu} DATA=${DATA:-cifar10} OUT=${OUT:-runs/$grid} SEEDS=${SEEDS:-0}
DESIGN=${DESIGN:-one} KEEP=${KEEP:-all}
TRAIN=${TRAIN:-} SAMPLE=${SAMPLE:-} MEASURE=${MEASURE:-} PYTHON=${PYTHON:-python}
command -v "$PYTHON" >/dev/null || PYTHON=python3
read -r -a slots <<<"$GPUS"
((${#slots[@]})) || die "GPUS: names no device"
THREADS=$(($(nproc) / ${#slots[@]}))
if ((THREADS < 1)); then THREADS=1; fi
export DATA OUT TRAIN SAMPLE MEASURE PYTHON GPUS THREADS IMAGES KEEP

for value in $N $BATCH $WIDTH $SEEDS $IMAGES; do
  [[ $value =~ ^[0-9]+$ ]] || die "$value: N, WIDTH, BATCH, SEEDS and IMAGES take whole numbers"
done
for value in $LR; do
  [[ $value =~ ^[0-9.]+(e-?[0-9]+)?$ ]] || die "LR=$value: not a number"
done
[[ $KEEP =~ ^(all|last|none)$ ]] || die "KEEP=$KEEP: must be all, last or none"
[[ $DESIGN =~ ^(one|full)$ ]] || die "DESIGN=$DESIGN: must be one (factor at a time) or full"

grid_rows() {           # the runs, a line each: NAME N WIDTH BATCH LR SEED, the longest first
  local seed n w b lr
  for seed in $SEEDS; do for n in $N; do for w in $WIDTH; do for b in $BATCH; do for lr in $LR; do
    local changed=0
    if [[ $n != "${N%% *}" ]]; then changed=$((changed + 1)); fi
    if [[ $w != "${WIDTH%% *}" ]]; then changed=$((changed + 1)); fi
    if [[ $b != "${BATCH%% *}" ]]; then changed=$((changed + 1)); fi
    if [[ $lr != "${LR%% *}" ]]; then changed=$((changed + 1)); fi
    if [[ $DESIGN == one ]] && ((changed > 1)); then continue; fi
    # A step costs about as much as its images' FLOPs plus what launching it takes.
    echo "$((IMAGES * (25600 + b * w * w) / b)) N${n}_w${w}_B${b}_lr${lr}_s$seed $n $w $b $lr $seed"
  done; done; done; done; done | sort -k1,1nr -k2,2 | cut -d' ' -f2-
}
mapfile -t rows < <(grid_rows)

# --- What is done ---------------------------------------------------------------------------------

field() {               # column $2 of the last line of the CSV file $1; nothing where there is none
  if [[ -s $1 ]]; then
    awk -F, -v name="$2" 'NR == 1 { for (i = 1; i <= NF; i++) if ($i == name) k = i }
      END { if (k && NR > 1) print $k }' "$1"
  fi
}

lines() { if [[ -s $1 ]]; then wc -l <"$1"; else echo 0; fi; }

last_step() { echo $(((IMAGES + $1 - 1) / $1)); }       # of a run with batch $1

state() {               # how far the run $1 with batch $2 is: "done", ..., "not started"
  local last log=$OUT/$1/log.csv metrics=$OUT/$1/metrics.csv trained measured
  last=$(last_step "$2") trained=$(field "$log" step) measured=$(field "$metrics" step)
  # The stages go by step, so the last snapshot is the last to be measured.
  if ((${measured:-0} >= last)) && [[ $(lines "$log") == "$(lines "$metrics")" ]]; then
    echo "done"
  elif [[ -n $measured ]]; then
    echo "measuring, step $measured of $last"
  elif ((${trained:-0} >= last)); then
    echo "sampling"
  elif [[ -n $trained ]]; then
    echo "training, step $trained of $last"
  else
    echo "not started"
  fi
}

# --- How long and how large the rest is -----------------------------------------------------------

known() {               # images/s and parameters of width $1, batch $2, as runs of OUT show them
  local folder log
  for folder in "$OUT"/*_w"$1"_B"$2"_* "$scratch"/*_w"$1"_B"$2"_*; do
    log=$(field "$folder/log.csv" images_per_second)
    if [[ -n $log ]]; then
      echo "$log $(sed -n 's/.*"parameters": \([0-9]*\).*/\1/p' "$folder/args.json")"
      return
    fi
  done
}

time_model() {          # a few steps of the row $1, so that `known` finds its speed
  local name n width batch lr seed options device=${slots[0]}
  read -r name n width batch lr seed <<<"$1"
  if [[ $device == cpu ]]; then
    export OMP_NUM_THREADS=$THREADS
  else
    export CUDA_VISIBLE_DEVICES=$device
    device=cuda
  fi
  train_options
  echo "timing $name" >&2
  "$PYTHON" train.py "${options[@]}" --steps 16 --first-eval 2 --evals-per-doubling 1 \
    --eval-images 10 --out "$scratch/$name" --device "$device" >/dev/null ||
    die "$name: cannot be timed, see above"
}

sample_option() {       # the value of option $1 in SAMPLE, $2 where it has none
  local word previous='' value=$2
  for word in $SAMPLE; do
    if [[ $previous == "$1" ]]; then value=$word; fi
    previous=$word
  done
  echo "$value"
}

plan() {                # the dry run: a line a run, then the sum
  local row name n width batch lr seed now rate parameters left hours=0 disk=0 unknown=0 count=0
  local forwards h g
  forwards=$(($(sample_option --num 2048) * $(sample_option --sampling-steps 250)))
  printf '%-36s %-28s %9s %9s\n' run state hours GB
  for row in "${rows[@]}"; do
    read -r name n width batch lr seed <<<"$row"
    now=$(state "$name" "$batch")
    if [[ $now == "done" ]]; then printf '%-36s %s\n' "$name" "$now" && continue; fi
    count=$((count + 1))
    if [[ $timing == --time && -z $(known "$width" "$batch") ]]; then time_model "$row"; fi
    read -r rate parameters < <(known "$width" "$batch" || true) || true
    left=$(field "$OUT/$name/log.csv" step)
    left=$((IMAGES - batch * ${left:-0}))
    if [[ -z ${rate:-} ]]; then
      printf '%-36s %-28s %9s %9s\n' "$name" "$now" "?" "?" && unknown=$((unknown + 1)) && continue
    fi
    # Of a training step, sampling does the forward third. last.pt holds weights, average and
    # Adam's two moments, a snapshot the average: 4 bytes a parameter each.
    read -r h g < <(awk -v left="$left" -v rate="$rate" -v p="$parameters" -v keep="$KEEP" \
      -v steps="$(last_step "$batch")" -v drawn="$(lines "$OUT/$name/metrics.csv")" \
      -v forwards="$forwards" 'BEGIN {
        shots = 2 + int(2 * log(steps / 64 + 1) / log(2))
        sampled = drawn > 1 ? drawn - 1 : 0
        kept = keep == "all" ? shots + 4 : keep == "last" ? 5 : 0
        print (left + (shots - sampled) * forwards / 3) / rate / 3600, kept * 4 * p / 1e9 }')
    printf '%-36s %-28s %9.2f %9.2f\n' "$name" "$now" "$h" "$g"
    hours=$(awk "BEGIN { print $hours + $h }") disk=$(awk "BEGIN { print $disk + $g }")
  done
  echo "$grid: ${#rows[@]} runs in $OUT, $count to do, ${#slots[@]} at a time"
  if ((unknown == count && count)); then
    echo "no model size of these has run here: --dry-run --time times them"
    return
  fi
  printf 'training and sampling left: %.2f hours, %.2f a slot; weights kept: %.1f GB (KEEP=%s)\n' \
    "$hours" "$(awk "BEGIN { print $hours / ${#slots[@]} }")" "$disk" "$KEEP"
  if ((unknown)); then
    echo "and $unknown runs of a model size that never ran here: --dry-run --time times them"
  fi
}

status() {              # a table of what the runs' files say
  local row name n width batch lr seed folder
  printf '%-36s %-28s %9s %9s %9s\n' run state held-out copies images/s
  for row in "${rows[@]}"; do
    read -r name n width batch lr seed <<<"$row"
    folder=$OUT/$name
    printf '%-36s %-28s %9.8s %9.8s %9s\n' "$name" "$(state "$name" "$batch")" \
      "$(field "$folder/log.csv" heldout_loss)" "$(field "$folder/metrics.csv" copy_ratio)" \
      "$(field "$folder/log.csv" images_per_second)"
  done
}

todo=() finished=() task=${SLURM_ARRAY_TASK_ID:-}
for row in "${rows[@]}"; do
  read -r name n width batch lr seed <<<"$row"
  if [[ -n $only && $name != "$only" ]]; then continue; fi
  if [[ -n $task && $row != "${rows[$task]:-}" ]]; then continue; fi
  if [[ $(state "$name" "$batch") != "done" ]]; then todo+=("$row"); else finished+=("$name"); fi
done
case $mode in
--list) printf '%s\n' "${rows[@]%% *}" && exit ;;
--status) status && exit ;;
--dry-run)
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  plan
  exit
  ;;
--only) [[ " ${rows[*]%% *} " == *" $only "* ]] || die "--only $only: no such run; see --list" ;;
esac

# --- Run, then plot -------------------------------------------------------------------------------

again="the same command, with the same variables, continues (OUT=$OUT)"
mkdir -p "$OUT/logs" 2>/dev/null && [[ -w $OUT ]] || die "OUT=$OUT: cannot be written"
single=$task$only                              # one run among others that run elsewhere: no lock
if [[ -z $single ]]; then
  echo "$grid: ${#rows[@]} runs in $OUT, ${#todo[@]} to do, ${#slots[@]} at a time"
  # The lock is the kernel's, and the runs inherit it: it holds until the last of them has ended.
  exec 9>"$OUT/.lock"
  flock -w 1 9 || die "OUT=$OUT: another sweep, or a run that one left behind, works in this folder"
fi
for name in "${finished[@]}"; do tidy "$name"; done     # one was killed between the two
if ((${#todo[@]})); then
  set -m                # a process group of its own: all that xargs starts can be ended at once
  xargs -d '\n' -n 1 -P "${#slots[@]}" --process-slot-var=SLOT "$BASH" "$PWD/sweep.sh" --guard \
    < <(printf '%s\n' "${todo[@]}") &
  runner=$!
  set +m
  stop() {
    kill -TERM -- "-$runner" || true
    wait || true
    echo "interrupted: $again" >&2
    exit 130
  }
  trap stop INT TERM
  wait "$runner" || true                        # a failed run is looked at below
  trap - INT TERM
fi
failed=0
for row in "${todo[@]}"; do
  read -r name n width batch lr seed <<<"$row"
  if [[ $(state "$name" "$batch") == "done" ]]; then continue; fi
  failed=$((failed + 1))
  echo "FAILED $name, see $OUT/logs/$name.log:" >&2
  tail -n 3 "$OUT/logs/$name.log" 2>/dev/null | sed 's/^/    /' >&2 || true
done
if [[ -z $single ]] && ! "$PYTHON" plot.py "$OUT"; then
  echo "sweep.sh: plot.py failed, see above; '$PYTHON plot.py $OUT' draws again" >&2
  if ((!failed)); then exit 1; fi
fi
if ((failed)); then
  echo "sweep.sh: $failed of ${#rows[@]} runs failed; mend the cause, then $again" >&2
  exit 1
fi
