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
            echo "unmarked_$backbone-$seed $common"
            echo "plain_$backbone-$seed $common --marker 1"
            echo "isnet_$backbone-$seed $common --marker 1 --isnet 1"
        done
        common="--task classify --seed $seed --findings all"
        echo "unmarked_findings-$seed $common"
        echo "plain_findings-$seed $common --marker 1"
        echo "isnet_findings-$seed $common --marker 1 --isnet 1 --epochs 22"
    done
    common="--task classify --seed 0 --marker 1 --isnet 1"
    echo "pixels_only-0 $common --isnet-layers none"
    echo "epsilon_rule-0 $common --lrp-gamma 0"
    echo "one_logit-0 $common --explain label"
    echo "mean_pooling-0 $common --isnet-decay 1"
    echo "large_e-0 $common --isnet-e 1"
}

run() {
    name=$1
    shift
    [ -f "runs/$name/metrics.json" ] && return
    echo "$name"
    python train.py --out "runs/$name" --overwrite "$@" >"runs/$name.log" 2>&1 || echo "$name failed, see runs/$name.log"
}
export -f run

(classifiers; experiments) | xargs -P 2 -L 1 bash -c 'run "$@"' _
[ -f results/benchmark.json ] || python benchmark.py --json results/benchmark.json
python evaluate.py runs/span-0 runs/dino-0 && cp runs/span-0/compare.png results/
python evaluate.py runs/{isnet_resnet,plain_resnet,pixels_only,one_logit}-0 && cp runs/isnet_resnet-0/compare.png results/isnet.png
python tables.py runs
