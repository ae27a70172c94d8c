#!/usr/bin/env bash
# Train: DINOv3-IML, Yu et al., arXiv 2604.16083.
# Settings of its repository for Protocol-MVSS (DATA: the tampered images of CASIA v2), ViT-L with LoRA of rank 64.
# DINOV3=Meta's .pth of the ViT, from facebookresearch/dinov3 (DINOv3 License), or DINOV3=timm, which downloads timm's
# copy once. --resume needs none, unless the run has --save_trainable_only (150 MB a checkpoint instead of 1.4 GB).
#   TYPE      dinov3_vits16, dinov3_vitb16 or dinov3_vitl16 (default)
#   FINETUNE  lora (default), full or frozen
#   RANK      64 (default) or 32, of LoRA
#   BATCH     published per GPU: ViT-S 48; ViT-B 32, with RANK=64 24; ViT-L 24, with RANK=64 16 (default)
#   DATA=CASIA2 TEST=CASIA1 DINOV3=timm sh runs/train_dinov3_iml.sh [more flags of train.py]
DATA=${DATA:?set DATA to the training set: folder with Tp/ and Gt/, or a JSON}
TEST=${TEST:?set TEST to the test set, or a JSON of several}
OUTPUT=${OUTPUT:-output_dinov3_iml}
case " $* " in *" --resume "* | *" --resume="*) ;; *) : "${DINOV3:?set DINOV3 to the .pth of Meta, or to timm}" ;; esac

. "$(dirname "$0")/launch.sh"
launch train.py --model DINOv3_IML --dinov3_model_type "${TYPE:-dinov3_vitl16}" \
    --finetune "${FINETUNE:-lora}" --lora_rank "${RANK:-64}" ${DINOV3:+--dinov3_weights_path "$DINOV3"} \
    --if_resizing --image_size 512 --edge_mask_width 7 \
    --batch_size "${BATCH:-16}" --accum_iter 10 --epochs 100 --lr 3e-4 --min_lr 0 --weight_decay 0.05 \
    --warmup_epochs 5 --test_batch_size 48 --test_period 4 \
    --data_path "$DATA" --test_data_path "$TEST" --output_dir "$OUTPUT" "$@"
