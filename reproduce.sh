#!/usr/bin/env bash
# All experiments, two at a time on one core each; what is finished is skipped.
#
#   ./reproduce.sh            3 seeds of claims 1 to 7; fills the README's tables with it
#   ./reproduce.sh --all      and claim 8, longer DINO, baselines, other shortcuts, each part's worth, costs
#   ./reproduce.sh --quick    1 seed of some runs of claims 1, 2, 3, 5, 6 and 7; prints the claims
#   ./reproduce.sh --list, --list-all     prints the runs of the first two and their flags
set -euo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS=1
seeds="0 1 2"
all=no
case "${1:-}" in
    "" | --list) ;;
    --all | --list-all) all=yes ;;
    --quick) seeds=0 ;;
    *) sed -n 2,7p "$0" && exit 2 ;;
esac

pretraining() {
    for seed in $seeds; do
        echo "span-$seed --seed $seed"
        echo "dino-$seed --seed $seed --prior none"
        plates="--data parts --lr 5e-4 --teacher-temp 0.01 --global-scale 0.7 1"  # or DINO collapses; it
        plates="$plates --keep-going --seed $seed"                                # comes near that even so
        echo "parts_span-$seed $plates --prior statistics"
        echo "parts_dino-$seed $plates --prior none"
        echo "masks-$seed --seed $seed --prior masks"
    done
}

parts_of_span() {
    echo "no_alignment-0 --seed 0 --align none"
    echo "affine_alignment-0 --seed 0 --align affine"
    echo "no_following-0 --seed 0 --no-follow"
    echo "mse-0 --seed 0 --span-loss mse"
    echo "dice-0 --seed 0 --span-loss dice"
    echo "layer_before-0 --seed 0 --span-layer -2"
    echo "local_crops-0 --seed 0 --local-crops-number 2"
    echo "no_blur-0 --seed 0 --prior-blur 0"
}

weight() {  # of the ISNet loss, chosen on seeds that no table has
    [ "$1" = vit ] && echo 1 || echo 3
}

classifiers() {
    for seed in $seeds; do
        for backbone in resnet vit; do
            common="--task classify --seed $seed --backbone $backbone"
            echo "unmarked_$backbone-$seed $common"
            echo "plain_$backbone-$seed $common --marker 1"
            echo "isnet_$backbone-$seed $common --marker 1 --isnet $(weight $backbone)"
        done
    done
}

parts_of_isnet() {
    common="--task classify --seed 0 --marker 1 --isnet $(weight resnet)"
    echo "pixels_only-0 $common --isnet-layers none"
    echo "epsilon_rule-0 $common --lrp-gamma 0"
    echo "one_logit-0 $common --explain label"
    echo "mean_pooling-0 $common --isnet-decay 1"
    echo "large_e-0 $common --isnet-e 1"
    echo "constant_weight-0 $common --isnet-end 1"
    common="--task classify --seed 0 --backbone vit --marker 1 --isnet $(weight vit)"
    echo "vit_pixels_only-0 $common --isnet-layers none"
    echo "vit_unguided-0 $common --isnet-layers relevance"
}

one_mask() {  # what one labelled sample's masks are worth to ISNet, and to the two best of the other ways
    for seed in $seeds; do
        echo "first span_marked-$seed --seed $seed --marker 1"
        for backbone in resnet vit; do
            common="--task classify --seed $seed --backbone $backbone --marker 1"
            isnet="--isnet $(weight $backbone)"
            attention="$common --masks runs/span_marked-$seed"
            echo "first isnet_prior_$backbone-$seed $common $isnet --masks prior"
            echo "then isnet_attention_$backbone-$seed $attention $isnet"
            echo "then swap_attention_$backbone-$seed $attention --baseline swap"
            echo "then pipeline_attention_$backbone-$seed $attention --baseline pipeline"
        done
    done
}

baselines() {  # other ways to stay off the background; their weights were chosen on seed 10, which no table has
    for seed in $seeds; do
        for backbone in resnet vit; do
            while read -r baseline weight; do
                how="--baseline $baseline${weight:+ --baseline-weight $weight}"
                echo "${baseline}_$backbone-$seed --task classify --seed $seed --backbone $backbone --marker 1 $how"
            done < <(printf "%s\n" "multitask 100" gated "gain 10" "rrr 1" pipeline swap)
        done
    done
}

shortcuts() {  # of other kinds
    for seed in $seeds; do
        for kind in anywhere tint border; do
            common="--task classify --seed $seed --marker 1 --marker-kind $kind"
            echo "plain_$kind-$seed $common"
            echo "isnet_$kind-$seed $common --isnet $(weight resnet)"
            echo "swap_$kind-$seed $common --baseline swap"
            echo "pipeline_$kind-$seed $common --baseline pipeline"
            echo "vit_plain_$kind-$seed $common --backbone vit"
            echo "vit_isnet_$kind-$seed $common --backbone vit --isnet $(weight vit)"
        done
    done
}

poolings() {  # with labels, beside the unmarked classifiers, and without; at half the images of the SPAN runs
    for seed in $seeds; do
        common="--task classify --seed $seed"
        echo "vit_gap_labels-$seed $common --backbone vit --pool gap"
        echo "vit_simpool_labels-$seed $common --backbone vit --pool simpool"
        echo "resnet_simpool_labels-$seed $common --pool simpool"
        common="--seed $seed --train-images 750"
        echo "vit_cls_dino-$seed $common --prior none"
        echo "vit_gap_dino-$seed $common --prior none --pool gap"
        echo "vit_simpool_dino-$seed $common --prior none --pool simpool"
        echo "resnet_gap_dino-$seed $common --prior none --backbone resnet"
        echo "resnet_simpool_dino-$seed $common --prior none --backbone resnet --pool simpool"
        echo "vit_simpool_span-$seed $common --pool simpool"
    done
}

# Few labels: every row but `half` and `relvit_long` sees as many images in all; all have the same encoder.
few="--backbone vit --embed-dim 64 --depth 3 --num-heads 4 --batch-size 32 --lr 1e-3"

few_labels() {
    for seed in $seeds; do
        pretrained symbols50 30
        pretrained symbols500 6
    done
}

pretrained() {  # data, epochs of pretraining and as many of tuning
    common="$few --seed $seed --data data/$1-$seed"
    label="--task classify $common"
    echo "first scratch_$1-$seed $label --epochs $((2 * $2))"
    echo "first half_$1-$seed $label --epochs $2"
    echo "first joint_$1-$seed $label --epochs $((2 * $2)) --relations relations distances angles positions"
    while read -r name epochs how; do
        echo "first pre_${name}_$1-$seed $common --epochs $epochs --keep-going $how"
        echo "then tuned_${name}_$1-$seed $label --epochs $2 --init runs/pre_${name}_$1-$seed"
    done < <(
        echo "relvit $2 --ssl relvit --prior none"
        echo "relvit_long $((5 * $2)) --ssl relvit --prior none"
        echo "dino $2 --prior none"
    )
}

lists() {  # first: what starts from nothing; then: what starts from that
    (pretraining; classifiers; poolings) | sed "s/^/first /"
    few_labels
    [ $all = yes ] || return 0
    echo "first dino_long-0 --seed 0 --prior none --epochs 60"
    (parts_of_span; parts_of_isnet; baselines; shortcuts) | sed "s/^/first /"
    one_mask
}

transfer() {  # which runs are probed side by side
    for seed in $seeds; do
        echo "span-$seed dino-$seed"
        echo "parts_span-$seed parts_dino-$seed"
    done
}

quick() {  # of all that runs, what most claims need, at seed 0
    grep -E "^(span|dino|(unmarked|plain|isnet)_resnet|resnet_simpool_labels)-|_symbols50-" | grep -v _long_
}

run() {  # a line of the lists above, unless it is finished
    name=$1
    shift
    [ -f "runs/$name/metrics.json" ] && return
    echo "$name"
    python train.py --out "runs/$name" --overwrite "$@" >"runs/$name.log" 2>&1 ||
        echo "$name failed, see runs/$name.log"
}

probe() {  # features of two finished runs, with all labels and with few; the quick way leaves out fine-tuning
    [ -d "runs/$2" ] || return 0  # not among the quick ones
    grep -qs "${finetune:-heads}_mAUC_1_percent" "runs/$2/metrics.json" && return
    echo "$1 and $2, with few labels"
    python evaluate.py "runs/$1" "runs/$2" --only linear heads $finetune --fractions 0.01 0.05 0.1 0.25 1 >"runs/$1.probe.log" 2>&1 ||
        echo "$1 and $2 failed, see runs/$1.probe.log"
}
export -f run probe

if [[ "${1:-}" = --list* ]]; then
    lists | cut -d " " -f 2-
    exit
fi
mkdir -p runs results
symbols="50 500"
chosen=cat
export finetune=finetune
[ "${1:-}" = --quick ] && symbols=50 && chosen=quick && finetune=
for seed in $seeds; do
    for n in $symbols; do
        folder=data/symbols$n-$seed
        [ -f $folder/labels.csv ] && continue
        rm -rf $folder  # what a stopped run left
        python -m common.symbols $folder --train $n --seed $seed
    done
done
for stage in first then; do
    lists | grep "^$stage " | cut -d " " -f 2- | $chosen | xargs -r -P 2 -L 1 bash -c 'run "$@"' _
done
transfer | xargs -r -P 2 -L 1 bash -c 'probe "$@"' _
if [ "${1:-}" = --quick ]; then
    python -m experiments.tables runs --only claims few_labels transfer
    exit
fi
[ $all = no ] || python -m experiments.benchmark --json results/benchmark.json
python -m experiments.tables runs

picture() {  # name, what to measure, and the runs to show side by side
    name=$1 only=$2
    shift 2
    python evaluate.py "$@" --only "$only" && cp "$1/compare.png" "results/$name.png"
}
cp runs/span-0/low_data.png results/
picture compare attention runs/{span,dino}-0
picture pooling attention runs/vit_{cls_dino,simpool_dino,simpool_span}-0
if [ $all = yes ]; then
    picture isnet bias runs/{isnet_resnet,plain_resnet,pixels_only}-0
    picture one_mask bias runs/{isnet_attention,pipeline,swap,rrr,gain,multitask,gated}_resnet-0
fi
