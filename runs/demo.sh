#!/usr/bin/env bash
# The whole way on a small data set made here: data, training, test, robustness, masks. It downloads only the packages.
#   bash runs/demo.sh [more flags of train.py]        # about 3 minutes on two CPU cores after the installation
# The data go to demo_data/, all results to demo_output/ (DATA=... OUTPUT=... change that).
. "$(dirname "$0")/setup.sh"
DATA=${DATA:-$REPOSITORY/demo_data}
OUTPUT=${OUTPUT:-$REPOSITORY/demo_output}

set -e
if [ -e "$OUTPUT" ]; then
    echo "error: $OUTPUT already exists: remove it, or give another folder with OUTPUT=... bash runs/demo.sh" >&2
    exit 1
fi
script() { name=$1; shift; echo; echo "== $name $*"; "$PYTHON" "$REPOSITORY/$name" "$@"; }

echo "== tools/make_demo.py --output $DATA"
MADE=$("$PYTHON" "$REPOSITORY/tools/make_demo.py" --output "$DATA")
echo "$MADE"
script tools/check_data.py "$DATA/train.json" "$DATA/test_datasets.json" --output "$DATA/report.json"
script train.py --model NoiseNet --if_padding --image_size 256 \
    --data_path "$DATA/train.json" --test_data_path "$DATA/test_datasets.json" \
    --batch_size 8 --test_batch_size 8 --epochs 18 --lr 3e-3 --weight_decay 0.01 --warmup_epochs 1 --test_period 6 \
    --save_period 6 --log_per_epoch_count 2 --if_predict_label --output_dir "$OUTPUT" "$@"
# the checkpoint knows model, fitting and size
script test.py --test_data_json "$DATA/test_datasets.json" --checkpoint_path "$OUTPUT" --test_batch_size 8 \
    --metrics PixelF1 PixelIOU PixelAUC ImageAUC ImageF1 --save_per_image --output_dir "$OUTPUT/test"
script test_robust.py --test_data_path "$DATA/test_splicing.json" --checkpoint_path "$OUTPUT" --test_batch_size 8 \
    --output_dir "$OUTPUT/robust"
script save_images.py --test_data_path "$DATA/test_datasets.json" --checkpoint_path "$OUTPUT" --test_batch_size 8 \
    --save_overlay --output_dir "$OUTPUT/images"

cat <<TEXT

== To compare with the pixel-level F1 above: predicting everything tampered, the best constant prediction
$(echo "$MADE" | grep "everything tampered")

== Where to look
   $OUTPUT/test/results.csv, $OUTPUT/robust/results.csv     the tables above
   $OUTPUT/images/overlay/     image, outlined mask and predicted heat map side by side
   $OUTPUT/images/pred/        the masks
   PYTHON=$PYTHON sh $REPOSITORY/runs/tensorboard.sh $OUTPUT     curves and images in a browser
TEXT
