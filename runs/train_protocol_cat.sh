#!/usr/bin/env bash
# Train: Protocol-CAT of IMDL-BenCo: several sets, 1840 images of each per epoch (runs/balanced_dataset.json; put
# your paths into a copy).
#   DATA=my_balanced_dataset.json TEST=runs/test_datasets.json sh runs/train_protocol_cat.sh [more flags of train.py]
DATA=${DATA:-$(dirname "$0")/balanced_dataset.json}
TEST=${TEST:-$(dirname "$0")/test_datasets.json}
OUTPUT=${OUTPUT:-output_protocol_cat}

. "$(dirname "$0")/launch.sh"
launch train.py --model MyConvNeXt --backbone convnext_tiny \
    --if_resizing --image_size 512 --sample_number 1840 \
    --batch_size 8 --epochs 150 --lr 1e-4 --min_lr 5e-7 --weight_decay 0.05 --warmup_epochs 2 \
    --data_path "$DATA" --test_data_path "$TEST" --output_dir "$OUTPUT" "$@"
