#!/usr/bin/env bash
# Train: IML-ViT, Ma et al., arXiv 2307.14863.
# Settings of IMDL-BenCo's script. MAE=mae_pretrain_vit_base.pth, from facebookresearch/mae (CC BY-NC 4.0); --resume
# needs none.
#   DATA=CASIA2 TEST=CASIA1 sh runs/train_iml_vit.sh [more flags of train.py]
DATA=${DATA:?set DATA to the training set: folder with Tp/ and Gt/, or a JSON}
TEST=${TEST:?set TEST to the test set, or a JSON of several}
OUTPUT=${OUTPUT:-output_iml_vit}
case " $* " in *" --resume "* | *" --resume="*) ;; *) : "${MAE:?set MAE to mae_pretrain_vit_base.pth}" ;; esac

. "$(dirname "$0")/launch.sh"
launch train.py --model IML_ViT --edge_lambda 20 ${MAE:+--vit_pretrain_path "$MAE"} \
    --if_padding --image_size 1024 --edge_mask_width 7 \
    --batch_size 2 --accum_iter 8 --epochs 200 --lr 1e-4 --min_lr 5e-7 --weight_decay 0.05 --warmup_epochs 2 \
    --data_path "$DATA" --test_data_path "$TEST" --output_dir "$OUTPUT" "$@"
