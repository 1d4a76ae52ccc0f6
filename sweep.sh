#!/usr/bin/env bash
# Train, sample and measure every run of a grid, then plot. Started again, it continues.
#
#   ./sweep.sh toy                  the study in miniature: offline, CPU, under 30 minutes on 2 cores
#   ./sweep.sh cifar10              one factor at a time, 14 runs (DDPM, unconditional)
#   ./sweep.sh paper                the same 14 with the study's rectified flow, class-conditional
#   ./sweep.sh full                 the factorial of the same values, 320 runs
#   ./sweep.sh custom               your own N, WIDTH, BATCH, LR, SEEDS, one at a time or DESIGN=full
#   ./sweep.sh GRID --dry-run       each run, its state, and what is left to do; changes nothing
#
# Environment
#   GPUS    devices, a run at a time on each: "0 1 2 3"; "0 0" is two at a time on GPU 0; "cpu cpu"
#   OUT     folder of the runs (runs/GRID)
#   SEEDS   seeds, a run each ("0")
#   DATA    cifar10 (downloaded) or an .npz file; toy for toy
#   IMAGES  images that each run trains on (6400000; toy 48000)
#   N WIDTH BATCH LR                lists of values, the first of each the default
#   TRAIN SAMPLE MEASURE            more options for train.py, sample.py, measure.py
#   PYTHON  the interpreter (python)
set -euo pipefail
cd "$(dirname "$0")"

die() {
  echo "sweep.sh: $*" >&2
  exit 2
}

# --- One run: xargs calls `sweep.sh --run "NAME N WIDTH BATCH LR SEED"` with SLOT set ---------------

stage() {               # run a script with its output in the log; $1 is the script
  "$PYTHON" "$@" </dev/null >>"$OUT/logs/$name.log" 2>&1
}

run_one() {
  local name n width batch lr seed device devices more
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
  read -r -a more <<<"$TRAIN"
  stage train.py --data "$DATA" --n "$n" --width "$width" --batch "$batch" --lr "$lr" \
    --seed "$seed" --images "$IMAGES" --out "$OUT/$name" --device "$device" "${more[@]}" || return 1
  read -r -a more <<<"$SAMPLE"
  stage sample.py "$OUT/$name" --device "$device" "${more[@]}" || return 1
  read -r -a more <<<"$MEASURE"
  stage measure.py "$OUT/$name" --device "$device" "${more[@]}" || return 1
  echo "done   $name"
}

if [[ ${1:-} == --run ]]; then
  run_one "$2"
  exit
fi

# --- The grid ---------------------------------------------------------------------------------------

(($# >= 1)) || die "usage: ./sweep.sh toy|cifar10|paper|full|custom [--dry-run]"
grid=$1 mode=${2:-}
[[ -z $mode || $mode == --dry-run ]] || die "$mode: unknown option; there is --dry-run"
(($# <= 2)) || die "$3: one option at most"
case $grid in
toy)
  DATA=toy
  N=${N:-16 8 64 512} WIDTH=${WIDTH:-32 8 16} BATCH=${BATCH:-16 8 32} LR=${LR:-2e-3 5e-4 1e-3}
  IMAGES=${IMAGES:-48000} GPUS=${GPUS:-$(seq "$(nproc)" | sed "s/.*/cpu/" | xargs)}
  TRAIN="--size 8 --mults 1 2 --blocks 1 --embed 128 --eval-images 512 --first-eval 64 ${TRAIN:-}"
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
if [[ -z ${GPUS:-} ]]; then
  GPUS=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | xargs || true)
  GPUS=${GPUS:-cpu}
fi
DATA=${DATA:-cifar10} OUT=${OUT:-runs/$grid} SEEDS=${SEEDS:-0} DESIGN=${DESIGN:-one}
TRAIN=${TRAIN:-} SAMPLE=${SAMPLE:-} MEASURE=${MEASURE:-} PYTHON=${PYTHON:-python}
command -v "$PYTHON" >/dev/null || PYTHON=python3
read -r -a slots <<<"$GPUS"
THREADS=$(($(nproc) / ${#slots[@]}))
if ((THREADS < 1)); then THREADS=1; fi
export DATA OUT TRAIN SAMPLE MEASURE PYTHON GPUS THREADS IMAGES

for value in $N $BATCH $WIDTH $SEEDS $IMAGES; do
  [[ $value =~ ^[0-9]+$ ]] || die "$value: N, WIDTH, BATCH, SEEDS and IMAGES take whole numbers"
done
for value in $LR; do
  [[ $value =~ ^[0-9.]+(e-?[0-9]+)?$ ]] || die "LR=$value: not a number"
done

jobs() {                # the runs, a line each: NAME N WIDTH BATCH LR SEED, the longest first
  local n0=${N%% *} w0=${WIDTH%% *} b0=${BATCH%% *} lr0=${LR%% *} seed n w b lr
  for seed in $SEEDS; do
    for n in $N; do
      for w in $WIDTH; do
        for b in $BATCH; do
          for lr in $LR; do
            local changed=0
            if [[ $n != "$n0" ]]; then changed=$((changed + 1)); fi
            if [[ $w != "$w0" ]]; then changed=$((changed + 1)); fi
            if [[ $b != "$b0" ]]; then changed=$((changed + 1)); fi
            if [[ $lr != "$lr0" ]]; then changed=$((changed + 1)); fi
            if [[ $DESIGN == one ]] && ((changed > 1)); then continue; fi
            # A step costs about as much as its images' FLOPs plus what launching it takes.
            echo "$((IMAGES * (25600 + b * w * w) / b)) N${n}_w${w}_B${b}_lr${lr}_s$seed" \
              "$n $w $b $lr $seed"
          done
        done
      done
    done
  done | sort -k1,1nr -k2,2 | cut -d' ' -f2-
}

last_step() {           # the step of the last line of a CSV file; 0 where there is none
  { [[ -s $1 ]] && tail -n 1 "$1" | cut -d, -f1 | grep -E '^[0-9]+$'; } || echo 0
}

state() {               # of the run $1 with batch $2: "done", "step K of LAST" or "not started"
  local trained measured last=$(((IMAGES + $2 - 1) / $2))
  trained=$(last_step "$OUT/$1/log.csv")
  measured=$(last_step "$OUT/$1/metrics.csv")
  if ((measured >= last)) &&
    (($(wc -l <"$OUT/$1/log.csv") == $(wc -l <"$OUT/$1/metrics.csv"))); then
    echo "done"
  elif ((trained >= last)); then
    echo "trained, measured to step $measured of $last"
  elif ((trained > 0)); then
    echo "trained to step $trained of $last"
  else
    echo "not started"
  fi
}

todo=()
while read -r name n width batch lr seed; do
  now=$(state "$name" "$batch")
  if [[ $mode == --dry-run ]]; then printf '%-34s %s\n' "$name" "$now"; fi
  if [[ $now != "done" ]]; then todo+=("$name $n $width $batch $lr $seed"); fi
done < <(jobs)
total=$(jobs | wc -l)
echo "$grid: $total runs in $OUT, ${#todo[@]} to do, ${#slots[@]} at a time"
if [[ $mode == --dry-run ]]; then exit; fi

# --- Run, then plot ---------------------------------------------------------------------------------

mkdir -p "$OUT/logs" 2>/dev/null && [[ -w $OUT ]] || die "OUT=$OUT: cannot be written"
exec 9>"$OUT/.lock"
flock -n 9 || die "OUT=$OUT: another sweep is running in this folder"
trap 'echo; echo "interrupted: ./sweep.sh $grid continues from the last checkpoints" >&2; exit 130' INT TERM
if ((${#todo[@]})); then
  # A failed run exits with 1; xargs goes on with the others, and below each run is looked at anew.
  printf '%s\n' "${todo[@]}" |
    xargs -d '\n' -n 1 -P "${#slots[@]}" --process-slot-var=SLOT "$BASH" "$0" --run 9>&- || true
fi
failed=0
while read -r name n width batch lr seed; do
  if [[ $(state "$name" "$batch") == "done" ]]; then continue; fi
  failed=$((failed + 1))
  echo "FAILED $name, see $OUT/logs/$name.log:" >&2
  tail -n 3 "$OUT/logs/$name.log" 2>/dev/null | sed 's/^/    /' >&2 || true
done < <(jobs)
"$PYTHON" plot.py "$OUT"
if ((failed)); then
  echo "sweep.sh: $failed of $total runs failed; mend the cause, then ./sweep.sh $grid continues" >&2
  exit 1
fi
