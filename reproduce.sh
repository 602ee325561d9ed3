#!/usr/bin/env bash
# Every experiment behind the README's tables, two at a time on one core each; finished runs are skipped.
set -euo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS=1
mkdir -p runs results

experiments() {
    for seed in 0 1 2 3 4; do
        echo "span-$seed --seed $seed"
        echo "masks-$seed --seed $seed --prior masks"
        echo "dino-$seed --seed $seed --prior none"
    done
    echo "dino_long-0 --seed 0 --prior none --epochs 60"
    for seed in 0 1; do
        echo "no_alignment-$seed --seed $seed --align none"
        echo "affine_alignment-$seed --seed $seed --align affine"
        echo "no_following-$seed --seed $seed --no-follow"
        echo "mse-$seed --seed $seed --span-loss mse"
        echo "dice-$seed --seed $seed --span-loss dice"
        echo "layer_before-$seed --seed $seed --span-layer -2"
        echo "local_crops-$seed --seed $seed --local-crops-number 2"
        echo "no_blur-$seed --seed $seed --prior-blur 0"
    done
}

classifiers() {
    for seed in 0 1 2; do
        for backbone in resnet vit; do
            common="--task classify --seed $seed --backbone $backbone"
            [ $backbone = vit ] && common="$common --epochs 15"
            echo "unmarked_$backbone-$seed $common"
            echo "plain_$backbone-$seed $common --marker 1"
            echo "isnet_$backbone-$seed $common --marker 1 --isnet 1"
        done
        common="--task classify --seed $seed --findings all --epochs 12"
        echo "unmarked_findings-$seed $common"
        echo "plain_findings-$seed $common --marker 1"
        echo "isnet_findings-$seed $common --marker 1 --isnet 1"
    done
    common="--task classify --seed 0 --marker 1 --isnet 1"
    echo "pixels_only-0 $common --isnet-layers none"
    echo "epsilon_rule-0 $common --lrp-gamma 0"
    echo "one_logit-0 $common --explain label"
    echo "mean_pooling-0 $common --isnet-decay 1"
    echo "large_e-0 $common --isnet-e 1"
    echo "vit_pixels_only-0 $common --backbone vit --epochs 15 --isnet-layers none"
    echo "vit_unguided-0 $common --backbone vit --epochs 15 --isnet-layers relevance"
}

poolings() {  # with labels, beside the unmarked classifiers, and without; at half the images of the SPAN runs
    for seed in 0 1 2; do
        common="--task classify --seed $seed"
        echo "vit_gap_labels-$seed $common --backbone vit --epochs 15 --pool gap"
        echo "vit_simpool_labels-$seed $common --backbone vit --epochs 15 --pool simpool"
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

few_labels() {  # first: what starts from nothing; then: what starts from that
    for seed in 0 1 2; do
        pretrained phantom 30 "--findings all" "--train-images 500"
        pretrained symbols50 30 "" "--data data/symbols50-$seed"
        pretrained symbols500 6 "" "--data data/symbols500-$seed"
    done | grep "^$1 " | cut -d " " -f 2-
}

pretrained() {  # data, epochs of pretraining and as many of tuning, findings, flags of the data
    common="$few --seed $seed $4"
    label="--task classify $3 $common"
    echo "first scratch_$1-$seed $label --epochs $((2 * $2))"
    echo "first half_$1-$seed $label --epochs $2"
    echo "first joint_$1-$seed $label --epochs $((2 * $2)) --relations relations distances angles positions"
    while read -r name epochs how; do
        echo "first pre_${name}_$1-$seed $common --epochs $epochs --keep-going${how:+ $how}"  # a blank at the end would join the next line
        echo "then tuned_${name}_$1-$seed $label --epochs $2 --init runs/pre_${name}_$1-$seed"
    done < <(
        echo "relvit $2 --ssl relvit --prior none"
        echo "relvit_long $((5 * $2)) --ssl relvit --prior none"
        echo "dino $2 --prior none"
        [ "$1" = phantom ] && echo "span $2" && echo "relvit_span $2 --ssl relvit"
    )
}

run() {
    name=$1
    shift
    [ -f "runs/$name/metrics.json" ] && return
    echo "$name"
    python train.py --out "runs/$name" --overwrite "$@" >"runs/$name.log" 2>&1 || echo "$name failed, see runs/$name.log"
}
export -f run

for seed in 0 1 2; do
    for n in 50 500; do
        folder=data/symbols$n-$seed
        [ -f $folder/labels.csv ] && continue
        rm -rf $folder  # what a stopped run left
        python symbols.py $folder --train $n --seed $seed
    done
done
(classifiers; experiments; poolings; few_labels first) | xargs -P 2 -L 1 bash -c 'run "$@"' _
few_labels then | xargs -P 2 -L 1 bash -c 'run "$@"' _
[ -f results/benchmark.json ] || python benchmark.py --json results/benchmark.json
python evaluate.py runs/span-0 runs/dino-0 && cp runs/span-0/compare.png results/
python evaluate.py runs/{isnet_resnet,plain_resnet,pixels_only,one_logit}-0 && cp runs/isnet_resnet-0/compare.png results/isnet.png
python evaluate.py --images 3 runs/vit_{cls_dino,simpool_dino,simpool_span}-0 && cp runs/vit_cls_dino-0/compare.png results/pooling.png
python tables.py runs
