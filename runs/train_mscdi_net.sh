#!/usr/bin/env bash
# Train: MSCDI-Net, a model of IMDL-BenCo.
# Settings of IMDL-BenCo's script (4 GPUs). MIT_B4=mit_b4.pth, from NVlabs/SegFormer (non-commercial).
# --resume needs none of these weights.
#   DATA=CASIA2 TEST=CASIA1 NPROC=4 sh runs/train_mscdi_net.sh [more flags of train.py]
DATA=${DATA:?set DATA to the training set: folder with Tp/ and Gt/, or a JSON}
TEST=${TEST:?set TEST to the test set, or a JSON of several}
OUTPUT=${OUTPUT:-output_mscdi_net}
case " $* " in *" --resume "* | *" --resume="*) ;; *) : "${MIT_B4:?set MIT_B4 to mit_b4.pth}" ;; esac

. "$(dirname "$0")/launch.sh"
launch train.py --model MSCDI_Net ${MIT_B4:+--backbone_weights_path "$MIT_B4"} \
    --if_resizing --image_size 512 --edge_mask_width 7 \
    --batch_size 16 --accum_iter 8 --epochs 200 --lr 1e-4 --min_lr 5e-7 --weight_decay 0.05 --warmup_epochs 4 \
    --data_path "$DATA" --test_data_path "$TEST" --output_dir "$OUTPUT" "$@"
