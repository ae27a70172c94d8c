#!/usr/bin/env bash
# Train: SparseViT, Su et al., AAAI 2025.
# Settings of IMDL-BenCo's script (4 GPUs). UNIFORMER=uniformer_base_in1k.pth, from Sense-X/UniFormer.
# --resume needs none of these weights.
#   DATA=CASIA2 TEST=CASIA1 sh runs/train_sparse_vit.sh [more flags of train.py]
DATA=${DATA:?set DATA to the training set: folder with Tp/ and Gt/, or a JSON}
TEST=${TEST:?set TEST to the test set, or a JSON of several}
OUTPUT=${OUTPUT:-output_sparse_vit}
case " $* " in *" --resume "* | *" --resume="*) ;; *) : "${UNIFORMER:?set UNIFORMER to uniformer_base_in1k.pth}" ;; esac

. "$(dirname "$0")/launch.sh"
launch train.py --model SparseViT ${UNIFORMER:+--pretrained_path "$UNIFORMER"} \
    --if_resizing --image_size 512 \
    --batch_size 16 --epochs 200 --lr 2e-4 --min_lr 0 --weight_decay 0.05 --warmup_epochs 4 --seed 42 \
    --data_path "$DATA" --test_data_path "$TEST" --output_dir "$OUTPUT" "$@"
