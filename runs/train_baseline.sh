#!/usr/bin/env bash
# Train: a plain backbone of IMDL-BenCo (Ma et al., NeurIPS 2024), alone or with an extractor: MODEL=unet, srm_vit.
# Settings of its scripts for bayar_resnet and segformer, but 512 for vit, vit16 and swin. ImageNet weights of resnet,
# vit, vit16 and swin are downloaded once; segformer needs MIT=mit_b2.pth, from NVlabs/SegFormer (for non-commercial
# use). --resume needs none of these weights.
#   MODEL=bayar_resnet DATA=CASIA2 TEST=CASIA1 sh runs/train_baseline.sh [more flags of train.py]
MODEL=${MODEL:-bayar_resnet}
DATA=${DATA:?set DATA to the training set: folder with Tp/ and Gt/, or a JSON}
TEST=${TEST:?set TEST to the test set, or a JSON of several}
OUTPUT=${OUTPUT:-output_$MODEL}
SIZE=1024
case $MODEL in
    *unet) ;;
    *segformer)
        case " $* " in *" --resume "* | *" --resume="*) ;; *) : "${MIT:?set MIT to mit_b2.pth}" ;; esac
        set -- ${MIT:+--pretrain_pth_path "$MIT"} "$@" ;;
    *resnet) set -- --pretrained "$@" ;;
    *) SIZE=512; set -- --pretrained "$@" ;;
esac

. "$(dirname "$0")/launch.sh"
launch train.py --model "$MODEL" \
    --if_resizing --image_size $SIZE \
    --batch_size 1 --accum_iter 8 --epochs 200 --lr 1e-4 --min_lr 5e-7 --weight_decay 0.05 --warmup_epochs 2 \
    --data_path "$DATA" --test_data_path "$TEST" --output_dir "$OUTPUT" "$@"
