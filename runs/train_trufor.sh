#!/usr/bin/env bash
# Train: TruFor, Guillaro et al., CVPR 2023.
# Settings of IMDL-BenCo's script, for phase 2 (the mask). NOISEPRINT=noiseprint++.th, from grip-unina/TruFor, and
# MIT_B2=mit_b2.pth, from NVlabs/SegFormer (both non-commercial). With PHASE2=its checkpoint instead of these two,
# phase 3 (confidence and score) follows. What the network sees is as in that script too (input_range imdlbenco);
# INPUT_RANGE=authors gives Noiseprint++ what it was trained on.
# --resume needs none of these weights.
#   DATA=CASIA2 TEST=CASIA1 sh runs/train_trufor.sh [more flags of train.py]
DATA=${DATA:?set DATA to the training set: folder with Tp/ and Gt/, or a JSON}
TEST=${TEST:?set TEST to the test set, or a JSON of several}
INPUT_RANGE=${INPUT_RANGE:-imdlbenco}
if [ -n "${PHASE2:-}" ]; then
    OUTPUT=${OUTPUT:-output_trufor_phase3}
    set -- --phase 3 --pretrained_phase2 "$PHASE2" "$@"
else
    OUTPUT=${OUTPUT:-output_trufor}
    case " $* " in *" --resume "* | *" --resume="*) ;; *)
        : "${NOISEPRINT:?set NOISEPRINT to noiseprint++.th, or PHASE2 to a checkpoint of phase 2}"
        : "${MIT_B2:?set MIT_B2 to mit_b2.pth}" ;;
    esac
    set -- --phase 2 ${NOISEPRINT:+--pretrained_noiseprint "$NOISEPRINT"} ${MIT_B2:+--pretrained_mit_b2 "$MIT_B2"} "$@"
fi

. "$(dirname "$0")/launch.sh"
launch train.py --model Trufor --input_range "$INPUT_RANGE" --if_predict_label \
    --if_resizing --image_size 512 \
    --batch_size 8 --epochs 150 --lr 4e-6 --min_lr 0 --weight_decay 0.05 --warmup_epochs 2 \
    --if_not_amp \
    --data_path "$DATA" --test_data_path "$TEST" --output_dir "$OUTPUT" "$@"
