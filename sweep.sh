#!/usr/bin/env bash
# Train, sample and measure every run of a grid, then plot. Started again, it continues.
#
#   ./sweep.sh digits             the study in miniature: offline, on a CPU
#   ./sweep.sh toy                the same on drawn pictures, of which there is no end
#   ./sweep.sh mini               CIFAR-10 at 16x16, one factor at a time, 10 runs
#   ./sweep.sh cifar10            CIFAR-10, one factor at a time, 14 runs (DDPM, unconditional)
#   ./sweep.sh paper              the same 14 as the study: rectified flow, class-conditional
#   ./sweep.sh full               the factorial of the same values, 320 runs
#   ./sweep.sh custom             your own lists: one factor at a time, or DESIGN=full
#   ./sweep.sh class K            experiment K = 1 to 7 of the README's class, on digits
#
#   ./sweep.sh GRID --dry-run     each run, its state, and the hours and disk that are left
#   ./sweep.sh GRID --dry-run --time      the same, timing what never ran here
#   ./sweep.sh GRID --status      a table of the runs; `watch ./sweep.sh GRID --status`
#   ./sweep.sh GRID --list        the runs' names, the longest first
#   ./sweep.sh GRID --only NAME   one run
#   sbatch --array=0-13 --gres=gpu:1 sweep.sh GRID       a run of --list per Slurm task
#
# Environment
#   N WIDTH BATCH LR        lists of values, the first of each the default
#   VARY    lists for other options of train.py: "ema .99 .999; process ddpm flow; flip off on"
#   DESIGN  one (factor at a time) or full; default: one
#   SEEDS   seeds, a run each; default: 0
#   REPEATS more seeds, for the run with the default values alone (digits: "1 2")
#   IMAGES  images that each run trains on; 724N: in proportion to N, so 724 epochs
#   DATA    cifar10 (downloaded) or an .npz file; digits and toy have their own
#   OUT     folder of the runs; default: runs/GRID
#   GPUS    devices, a run at a time on each: "0 1 2 3"; "0 0" is two at a time on GPU 0; "cpu cpu"
#   OMP_NUM_THREADS         threads of a run on the CPU; default: the cores, shared out
#   KEEP    weights that stay once a run is measured: all, last or none; default: all
#   TRAIN SAMPLE MEASURE    more options for train.py, sample.py, measure.py
#   PYTHON  the interpreter; default: python
set -euo pipefail

die() {
  echo "sweep.sh: $*" >&2
  exit 2
}

home=$(dirname "$0")
if [[ ! -f $home/train.py ]]; then home=${SLURM_SUBMIT_DIR:-$home}; fi  # Slurm runs a copy of this
[[ -f $home/train.py ]] || die "train.py is not beside this script, nor where sbatch was called"

# --- The grid -------------------------------------------------------------------------------------

(($#)) || die "usage: ./sweep.sh digits|toy|mini|cifar10|paper|full|custom|class [--dry-run|--status|...]"
if [[ $1 == -h || $1 == --help ]]; then
  sed -n -e '/^set /q' -e '2,$s/^# \{0,1\}//p' "$0"
  exit
fi
if [[ -z ${PYTHON:-} ]]; then PYTHON=$(command -v python || echo python3); fi
command -v "$PYTHON" >/dev/null || die "PYTHON=$PYTHON: no such program"
usable='import os; f = getattr(os, "sched_getaffinity", None); print(len(f(0)) if f else os.cpu_count())'
cores=${SLURM_CPUS_ON_NODE:-$("$PYTHON" -c "$usable" || true)} cpus=cpu
[[ $cores =~ ^[1-9][0-9]*$ ]] || cores=1
for ((k = 1; k < cores; k++)); do cpus+=" cpu"; done

grid=$1 without_gpu=cpu plotting=() given=${GPUS:-}
shift
digits="--process flow --conditional --mults 1 2 --blocks 1 --embed 128 --eval-images 512"
digits+=" --first-eval 16"     # before N = 16 has copies
own_data() {            # of a grid that has its own
  [[ ${DATA:-$1} == "$1" ]] || die "DATA=$DATA: this grid is of $1; custom takes other data"
  DATA=$1
}

case $grid in           # a grid that takes an argument of its own shifts it away here
class)
  lesson=${1:-}
  (($#)) && shift
  case $lesson in
  1 | 3 | 6 | 7) : "${N:=64}" ;;
  2) : "${N:=64 16}" ;;
  4) : "${N:=16}" "${LR:=1e-3 3e-4 3e-3}" ;;
  5)
    : "${N:=512}" "${IMAGES:=44N}"
    [[ $N =~ ^[0-9]+$ ]] || die "N=$N: class 5 takes one number of images"
    [[ -z ${VARY:-} ]] || die "VARY=$VARY: class 5 varies the images itself"
    VARY="offset 0 $N"
    ;;
  *) die "class takes the number of an experiment, 1 to 7; the README says what they are" ;;
  esac
  : "${WIDTH:=32}" "${BATCH:=32}" "${LR:=1e-3}" "${IMAGES:=500N}" "${GPUS:=$cpus}"
  own_data digits
  TRAIN="$digits ${TRAIN:-}" SAMPLE="--num 128 --sampling-steps 20 ${SAMPLE:-}"
  ;;
digits)
  : "${N:=64 16 32 128 256}" "${WIDTH:=32 8 16}" "${BATCH:=32 16 64}" "${LR:=1e-3 3e-4 3e-3}"
  : "${IMAGES:=500N}" "${GPUS:=$cpus}" "${REPEATS=1 2}"
  own_data digits
  TRAIN="$digits ${TRAIN:-}" SAMPLE="--num 128 --sampling-steps 20 ${SAMPLE:-}"
  ;;
toy)
  : "${N:=16 8 32 512}" "${WIDTH:=32 8 16}" "${BATCH:=16 8 32}" "${LR:=1e-3 5e-4 2e-3}"
  : "${IMAGES:=40000}" "${GPUS:=$cpus}"
  own_data toy
  TRAIN="--size 8 --mults 1 2 --blocks 1 --embed 128 --eval-images 512 ${TRAIN:-}"
  SAMPLE="--num 128 --sampling-steps 50 ${SAMPLE:-}"
  ;;
mini)
  : "${N:=1024 512 256 2048}" "${WIDTH:=32 16 64}" "${BATCH:=64 32 128}" "${LR:=1e-3 3e-4 3e-3}"
  : "${IMAGES:=724N}"
  without_gpu=$cpus
  TRAIN="--size 16 --process flow --conditional --blocks 1 --embed 128 ${TRAIN:-}"
  SAMPLE="--num 512 --sampling-steps 50 ${SAMPLE:-}"
  ;;
paper)
  TRAIN="--process flow --conditional --weighting sigmoid ${TRAIN:-}"
  plotting=(--paper)    # the study's own curves behind ours
  ;;
full) DESIGN=full ;;
cifar10 | custom) ;;
*) die "$grid: unknown grid; there are digits, toy, mini, cifar10, paper, full, custom and class" ;;
esac
: "${N:=2048 4096 8192 16384}" "${WIDTH:=128 16 32 64 192}" "${BATCH:=16 32 64 128}"
: "${LR:=1e-4 1e-5 5e-5 4e-4}" "${SEEDS:=0}" "${IMAGES:=6400000}" "${VARY:=}" "${DESIGN:=one}"
: "${REPEATS:=}" "${DATA:=cifar10}" "${OUT:=runs/$grid}" "${KEEP:=all}" "${TRAIN:=}" "${SAMPLE:=}" "${MEASURE:=}"

mode=${1:-} only=
case "$mode $#" in
" 0" | "--dry-run 1" | "--status 1" | "--list 1") ;;
"--dry-run 2") [[ $2 == --time ]] || die "$2: unknown option; --dry-run takes --time" ;;
"--only 2") only=$2 ;;
"--only "*) die "--only takes the name of one run; --list prints them" ;;
*) die "$*: unknown option; there are --dry-run [--time], --status, --list and --only NAME" ;;
esac

if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then           # empty or -1: no GPU
  cuda=${CUDA_VISIBLE_DEVICES#-1}
  : "${GPUS:=${cuda//,/ }}"
elif [[ -z ${GPUS:-} ]]; then                           # nvidia-smi prints its errors here, too
  GPUS=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | grep '^[0-9]*$' || true)
fi
: "${GPUS:=$without_gpu}"
[[ $IMAGES =~ ^[1-9][0-9]*N?$ ]] || die "IMAGES=$IMAGES: must be one whole number, or like 724N"
[[ $DATA != *[[:space:]]* ]] || die "DATA=$DATA: a path without spaces, please"
[[ $DESIGN =~ ^(one|full)$ ]] || die "DESIGN=$DESIGN: must be one (factor at a time) or full"
[[ $KEEP =~ ^(all|last|none)$ ]] || die "KEEP=$KEEP: must be all, last or none"
read -r -d '' -a slots <<<"$GPUS" || true
read -r -d '' -a sampling <<<"$SAMPLE" || true
read -r -d '' -a measuring <<<"$MEASURE" || true
((${#slots[@]})) || die "GPUS: names no device"
if [[ -n $given && -n ${CUDA_VISIBLE_DEVICES+set} ]]; then      # others may not be ours
  for slot in "${slots[@]}"; do
    [[ $slot == cpu || ,$CUDA_VISIBLE_DEVICES, == *,"$slot",* ]] ||
      die "GPUS=$GPUS: $slot is not among CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"
  done
fi
threads=$((cores / ${#slots[@]}))
if ((threads < 1)); then threads=1; fi

# --- The runs: Python makes the grid, names its runs and says how far each of them is -------------

line() { echo "$1 $(tr '\n' ' ' <<<"$2")"; }             # what $1 is: the list $2

ask() {                 # the runs into `rows`: name, state, ... (measure.py) between tabs
  local answer row
  answer=$({
    line TRAIN "--data $DATA $TRAIN" && line SAMPLE "$SAMPLE" && line MEASURE "$MEASURE"
    echo "IMAGES $IMAGES" && echo "DESIGN $DESIGN" && echo "KEEP $KEEP" && line ONLY "$only"
    line --n "$N" && line --width "$WIDTH" && line --batch "$BATCH" && line --lr "$LR"
    line --seed "$SEEDS" && line REPEATS "$REPEATS" && tr ';' '\n' <<<"$VARY" | sed 's/^[[:space:]-]*\([^[:space:]]\)/--\1/'
  } | "$PYTHON" "$home/measure.py" --sweep "$OUT" "$@") || return
  rows=()
  while IFS= read -r row; do rows+=("$row"); done <<<"$answer"
}

on_device() {           # $1 of GPUS: the environment and `device` for the scripts
  if [[ $1 == cpu ]]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
    device=cpu
  else
    export CUDA_VISIBLE_DEVICES=$1
    device=cuda
  fi
}

case $mode in
--list)
  ask
  printf '%s\n' "${rows[@]%%$'\t'*}"
  exit
  ;;
--status)
  ask
  { printf 'run\tstate\theld-out\tcopies\timages/s\n' && printf '%s\n' "${rows[@]}"; } |
    awk -F'\t' '{ printf "%-36s %-28s %9s %9s %9s\n", $1, $2, $3, $4, $5 }'
  exit
  ;;
--dry-run)
  if (($# == 2)); then on_device "${slots[0]}" && ask "$device"; else ask; fi
  { printf 'run\tstate\t\t\t\thours\tGB\n' && printf '%s\n' "${rows[@]}"; } |
    awk -F'\t' -v what="$grid: ${#rows[@]} runs in $OUT" -v slots=${#slots[@]} -v keep="$KEEP" '
      { printf "%-36s %-28s %9s %9s\n", $1, $2, $6, $7 }
      NR > 1 && $2 != "done" { todo++; unknown += $6 == "?"; hours += $6; disk += $7 }
      END {
        printf "%s, %d to do, %d at a time\n", what, todo, slots
        if (unknown) printf "%d have steps that were never timed here: --dry-run --time " \
          "times them; without them\n", unknown
        printf "training and sampling left: %.2f hours, %.2f per slot; ", hours, hours / slots
        printf "weights to be kept: %.1f GB (KEEP=%s)\n", disk, keep }'
  exit
  ;;
esac

ask
task=${SLURM_ARRAY_TASK_ID:-}
if [[ -n $task && -z $only ]]; then
  if ! [[ $task =~ ^(0|[1-9][0-9]{0,8})$ ]] || ((task >= ${#rows[@]})); then
    die "SLURM_ARRAY_TASK_ID=$task: the runs are 0 to $((${#rows[@]} - 1)); see --list"
  fi
  rows=("${rows[task]}")
  only=${rows[0]%%$'\t'*}
fi

if [[ -n $task && -z $given ]]; then        # the only one in what Slurm gave
  slots=("${slots[0]}") threads=$cores
fi

# --- One run --------------------------------------------------------------------------------------

stage() {               # a script of ours with its options, its output to the run's log
  "$PYTHON" "$home/$1" "${@:2}" </dev/null >>"$OUT/logs/$name.log" 2>&1
}

run_one() {             # the row $1 on `device`
  local name state options only rows         # the last two are what `ask` takes and gives
  IFS=$'\t' read -r name state _ <<<"$1"
  read -r -a options <<<"${1##*$'\t'}"
  echo "start  $name"
  if [[ $state != measuring* ]]; then   # for which the weights may be gone (KEEP)
    stage train.py "${options[@]}" --out "$OUT/$name" --device "$device" || return 1
    stage sample.py "$OUT/$name" --device "$device" ${sampling[@]+"${sampling[@]}"} || return 1
  fi
  stage measure.py "$OUT/$name" --device "$device" ${measuring[@]+"${measuring[@]}"} || return 1
  if [[ $KEEP != all ]]; then only=$name && ask && tidy "${rows[0]}"; fi
  echo "done   $name"
}

tidy() {                # remove the weights that KEEP does not keep; only if the row $1 is done
  local name state snapshots
  IFS=$'\t' read -r name state _ <<<"$1"
  [[ $state == "done" ]] || return 0
  snapshots=("$OUT/$name"/snapshots/[0-9]*.pt)
  case $KEEP in
  last) rm -f -- "${snapshots[@]:0:${#snapshots[@]}-1}" ;;
  none) rm -f -- "${snapshots[@]}" "$OUT/$name/last.pt" ;;
  esac
}

teach() {               # what experiment $lesson does with each of its runs, and what they show
  local row name run device twin
  on_device "${slots[0]}"
  for row in "${rows[@]}"; do
    name=${row%%$'\t'*}
    run=$OUT/$name
    case $lesson in
    3)
      "$PYTHON" "$home/sample.py" "$run" --exact --device "$device" ${sampling[@]+"${sampling[@]}"}
      "$PYTHON" "$home/measure.py" "$run" --device "$device" ${measuring[@]+"${measuring[@]}"}
      ;;
    5)                  # with the run of the same seed that has other images
      for twin in "${rows[@]%%$'\t'*}"; do
        [[ $twin == "${name}_offset"* ]] || continue
        "$PYTHON" "$home/measure.py" "$run" --twin "$OUT/$twin" --device "$device"
      done
      ;;
    6) "$PYTHON" "$home/measure.py" "$run" --planted --device "$device" ${measuring[@]+"${measuring[@]}"} ;;
    7) "$PYTHON" "$home/measure.py" "$run" --denoisers --device "$device" ;;
    esac
  done
  for row in "${rows[@]}"; do "$PYTHON" "$home/plot.py" "$OUT/${row%%$'\t'*}"; done
}

work() {                # on the device $1, one after the other, the runs that nobody has taken yet
  local device k
  on_device "$1"
  for ((k = 0; k < ${#todo[@]}; k++)); do
    # Where this script has been killed nothing new begins. (A zombie, Z, waits for its parent.)
    kill -0 $$ 2>/dev/null && [[ $(ps -o stat= -p $$ 2>/dev/null) != Z* ]] || break
    if mkdir "$claims/$k" 2>/dev/null; then run_one "${todo[k]}" || true; fi
  done
}

# --- All runs, then plot --------------------------------------------------------------------------

again="the same command, with the same variables, continues (OUT=$OUT)"
mkdir -p "$OUT/logs" 2>/dev/null && [[ -w $OUT ]] || die "OUT=$OUT: cannot be written"
if [[ -z $only ]]; then
  # The lock is the kernel's, on this file descriptor, which Python's end does not close. The runs
  # inherit it: it holds until the last of them has ended, and no longer, however they end.
  exec 9>"$OUT/.lock"
  lock() { "$PYTHON" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>&1; }
  if ! error=$(lock) && sleep 2 && ! error=$(lock); then
    [[ $error == *BlockingIOError* ]] || die "OUT=$OUT: cannot be locked: ${error##*$'\n'}"
    die "OUT=$OUT: another sweep works in this folder, or the runs of one that was killed; wait for them"
  fi
fi
todo=()
for row in "${rows[@]}"; do
  IFS=$'\t' read -r name state _ <<<"$row"
  case $state in
  "done") tidy "$row" ;;                # a sweep was killed between the two
  "another run"*) die "$OUT/$name: holds $state; take another OUT, or move that folder away" ;;
  *) todo+=("$row") ;;
  esac
done
if [[ -z $only ]]; then
  echo "$grid: ${#rows[@]} runs in $OUT, ${#todo[@]} to do, ${#slots[@]} at a time"
fi
claims=$OUT/.claims$only workers=()     # a folder in it for every run that a worker has taken
rm -rf "$claims"
mkdir "$claims"

end_workers() {         # and all that they started
  local worker
  for worker in ${workers[@]+"${workers[@]}"}; do kill -TERM -- "-$worker" 2>/dev/null || true; done
  wait
  rm -rf "$claims"
}

stop() {
  end_workers
  echo "interrupted: $again" >&2
  exit 130
}
trap stop INT TERM HUP
set -m                  # each worker gets a process group of its own, which can be ended at once
for slot in "${slots[@]}"; do
  work "$slot" &
  workers+=($!)
done
set +m
for worker in "${workers[@]}"; do wait "$worker" || true; done
trap - INT TERM HUP
end_workers             # what a worker that was killed left behind

failed=0
if ((${#todo[@]})); then ask; fi
for row in "${rows[@]}"; do
  IFS=$'\t' read -r name state _ <<<"$row"
  if [[ $state == "done" ]]; then continue; fi
  failed=$((failed + 1))
  echo "FAILED $name, see $OUT/logs/$name.log:" >&2
  tail -n 3 "$OUT/logs/$name.log" 2>/dev/null | sed 's/^/    /' >&2 || true
done
if [[ $grid == class ]]; then
  ((failed)) || teach
elif [[ -z $only ]] && ! "$PYTHON" "$home/plot.py" "$OUT" ${plotting[@]+"${plotting[@]}"}; then
  echo "sweep.sh: plot.py failed, see above; '$PYTHON $home/plot.py $OUT' draws again" >&2
  if ((!failed)); then exit 1; fi
fi
if ((failed)); then
  echo "sweep.sh: $failed of ${#rows[@]} runs failed; mend the cause, then $again" >&2
  exit 1
fi
