#!/usr/bin/env bash
# Train: Mesorch, Zhu et al., AAAI 2025.
# Settings of IMDL-BenCo's script (4 GPUs, several sets mixed as in train_protocol_cat.sh). ImageNet weights of ConvNeXt
# are downloaded once. MIT=mit_b3.pth, from NVlabs/SegFormer (for non-commercial use).
# --resume needs none of these weights.
#   DATA=my_balanced_dataset.json TEST=CASIA1 sh runs/train_mesorch.sh [more flags of train.py]
DATA=${DATA:-$(dirname "$0")/balanced_dataset.json}
TEST=${TEST:?set TEST to the test set, or a JSON of several}
OUTPUT=${OUTPUT:-output_mesorch}
case " $* " in *" --resume "* | *" --resume="*) ;; *) : "${MIT:?set MIT to mit_b3.pth}" ;; esac

. "$(dirname "$0")/launch.sh"
launch train.py --model Mesorch --conv_pretrain ${MIT:+--seg_pretrain_path "$MIT"} \
    --if_resizing --image_size 512 --sample_number 1840 \
    --batch_size 12 --accum_iter 2 --epochs 150 --lr 1e-4 --min_lr 5e-7 --weight_decay 0.05 --warmup_epochs 2 \
    --test_period 2 \
    --data_path "$DATA" --test_data_path "$TEST" --output_dir "$OUTPUT" "$@"
