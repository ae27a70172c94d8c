#!/usr/bin/env bash
# Train: SPAN, Hu et al., ECCV 2020.
# Settings of IMDL-BenCo's script; its decoder was random, so its figures can't be reproduced.
# IMTFE=IMTFEv4.pt, the extractor's weights from ManTraNet-pytorch (non-commercial use only): they were trained without
# the residuals that IMDL-BenCo added; --no-residual keeps their meaning.
# --resume needs none of these weights.
#   DATA=CASIA2 TEST=CASIA1 sh runs/train_span.sh [more flags of train.py]
DATA=${DATA:?set DATA to the training set: folder with Tp/ and Gt/, or a JSON}
TEST=${TEST:?set TEST to the test set, or a JSON of several}
OUTPUT=${OUTPUT:-output_span}
case " $* " in *" --resume "* | *" --resume="*) ;; *) : "${IMTFE:?set IMTFE to IMTFEv4.pt}" ;; esac

. "$(dirname "$0")/launch.sh"
launch train.py --model SPAN ${IMTFE:+--weight_path "$IMTFE"} \
    --if_resizing --image_size 224 \
    --batch_size 8 --accum_iter 8 --epochs 200 --lr 1e-4 --min_lr 5e-7 --weight_decay 0.05 --warmup_epochs 2 \
    --data_path "$DATA" --test_data_path "$TEST" --output_dir "$OUTPUT" "$@"
