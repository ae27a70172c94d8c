"""Images side by side with words below: for TensorBoard while a model trains, and for save_images.py --save_overlay.

Pixels are uint8 (H, W, 3) in OpenCV's order, BGR.
"""
import os

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import data
import ddp
from counting import valid_area
from evaluate import label_scores
from log import add_image
from registry import visible

PAGE = (224, 224, 224)  # the colour around tiles, neither black nor white, which masks are
HANDFUL, TILE = 6, 256  # TensorBoard's panels: images of a set, and the longer side of each tile in pixels
BINS = 127  # thresholds of a precision-recall curve; TensorBoard takes no more

# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def fit(pixels, low, high):
    """Scale pixels (H, W) or (H, W, 3) so that the longer side is at least `low` and at most `high`."""
    height, width = pixels.shape[:2]
    scale = min(max(height, width, low), high) / max(height, width)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)


def heat_over(image, values):
    """Lay a map (H, W) uint8 as colours over an image (H, W, 3) BGR."""
    return cv2.addWeighted(image, 0.5, cv2.applyColorMap(values, cv2.COLORMAP_JET), 0.5, 0)


def outlined(image, mask):
    """Return an image with the outline of what a mask (H, W) uint8 marks, in white on black, to be seen on anything."""
    contours, _ = cv2.findContours((mask > 0).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    width = 1 + max(mask.shape) // 600
    image = cv2.drawContours(image.copy(), contours, -1, (0, 0, 0), 3 * width)
    return cv2.drawContours(image, contours, -1, (255, 255, 255), width)


def text_size(height):
    """Return the size in pixels of the words beside or below a tile."""
    return max(12, height // 32)


def legend(height):
    """Return the colours of `heat_over` from 1 to 0 with these numbers beside, as high as a tile."""
    size = text_size(height)
    bar = np.repeat(np.linspace(255, 0, height).astype(np.uint8)[:, None], size, axis=1)
    words, font = Image.new("RGB", (2 * size, height), PAGE), ImageFont.load_default(size)
    for value, place, anchor in (("1", 0, "la"), ("0.5", height // 2, "lm"), ("0", height, "ld")):
        ImageDraw.Draw(words).text((size // 4, place), value, "black", font, anchor)
    gap = np.full((height, size // 2, 3), PAGE, np.uint8)
    return np.hstack([gap, cv2.applyColorMap(bar, cv2.COLORMAP_JET), np.array(words)])


def shortened(text, font, width):
    """Return text that is no wider than `width` pixels, with "..." for its middle; what is not ASCII, which Pillow's
    own font can't show, as "\\u4e2d" and the like."""
    text = visible(text).encode("ascii", "backslashreplace").decode()
    for kept in range(min(len(text), 200), 1, -1):
        shown = text if kept == len(text) else f"{text[:kept // 2]}...{text[-(kept - kept // 2):]}"
        if font.getlength(shown) <= width:
            return shown
    return ""


def panel(tiles, words, width=0):
    """Put tiles side by side, with a line of words below each, in cells at least `width` pixels wide."""
    height = max(tile.shape[0] for tile in tiles)
    size = text_size(height)
    cells = [max(tile.shape[1], width or 14 * size) for tile in tiles]
    shown = Image.new("RGB", (sum(cells) + size // 2 * (len(cells) - 1), height + 3 * size // 2), PAGE)
    font, left = ImageFont.load_default(size), 0
    for tile, text, cell in zip(tiles, words, cells, strict=True):
        shown.paste(Image.fromarray(tile[..., ::-1].copy()), (left, 0))
        ImageDraw.Draw(shown).text((left, height + size), shortened(text, font, cell), "black", font, "ls")
        left += cell + size // 2
    return np.asarray(shown)[..., ::-1]


def overlay(image, mask, pred, name, score):
    """Return the panel of save_images.py: image, mask and heat map.

    Args:
        image: (H, W, 3) RGB
        mask: (H, W) 0/1, or None where there are no labels
        pred: (H, W) uint8, the probability x 255
        name: of the image
        score: the image-level one, or "" where the model gives none
    """
    image, pred = (fit(pixels, 256, 1024) for pixels in (image[..., ::-1], pred))
    tiles, words = [image], [name]
    if mask is not None:
        tiles.append(outlined(image, fit(mask * 255, 256, 1024)))
        words.append("mask" if mask.any() else "authentic")
    tiles.append(np.hstack([heat_over(image, pred), legend(len(image))]))
    words.append("prediction" if score == "" else f"prediction, score {score:.4f}")
    return panel(tiles, words)


# ---------------------------------------------------------------------------------------------------------------------
# TensorBoard


def rows_of(batch, output, chosen):
    """Return a panel for each of some images of a batch, by their places: the image, its mask, the prediction, what of
    it is above 0.5, both over the image, and every visual_image. Padding is cut off."""
    def shown(values, i):  # (B, 1 or 3, H, W) in 0..1, as pixels
        pixels = values[i].detach().float().clamp(0, 1).mul(255).byte().permute(1, 2, 0).cpu().numpy()
        if pixels.shape[:2] != size:
            pixels = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_NEAREST)
        pixels = fit(np.squeeze(pixels)[:height, :width], TILE, TILE)
        return pixels[..., ::-1] if pixels.ndim == 3 else cv2.cvtColor(pixels, cv2.COLOR_GRAY2BGR)

    rows, size, pred = [], tuple(batch["mask"].shape[2:]), output.get("pred_mask")
    scores = label_scores(output, batch["label"]) if chosen else None
    for i in chosen:
        height, width = batch["shape"][i].tolist()
        image, mask = shown(data.denormalise(batch["image"][i:i + 1]), 0), shown(batch["mask"], i)
        name = os.path.basename(batch["name"][i])
        tiles = [image, mask]
        words = [name if scores is None else f"{scores[i].item():.2f}  {name}", "mask"]
        if pred is not None:
            heat = shown(pred, i)
            tiles += [heat, shown(pred > 0.5, i), outlined(heat_over(image, heat[..., 0]), mask[..., 0])]
            words += ["prediction", "above 0.5", "both over the image"]
        extra = {key: value for key, value in (output.get("visual_image") or {}).items()
                 if value is not pred and i < len(value)}  # many models return pred_mask here once more
        rows.append(panel([*tiles, *(shown(value, i) for value in extra.values())], [*words, *extra], TILE))
    return rows


def write_rows(writer, tag, rows, step):
    """Write panels to TensorBoard, one below the other."""
    width = max(row.shape[1] for row in rows)
    rows = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=PAGE[0]) for row in rows]
    add_image(writer, f"{tag}/images", np.vstack(rows), step)


class Watch:
    """What TensorBoard shows of an evaluation beside its values: a handful of images spread over the set, the same ones
    each time, and the set's precision-recall curve, over the pixels of every second row and column.

        watch = Watch(test_set)
        evaluate(..., on_batch=watch)      # on every rank
        watch.write(writer, "test CASIAv1", epoch)
    """

    def __init__(self, dataset):
        last = len(range(ddp.rank(), len(dataset), ddp.world_size())) - 1  # of this rank's share
        self.chosen = {round(i * last / (HANDFUL - 1)) for i in range(HANDFUL)} if ddp.is_main() else set()
        self.seen, self.rows, self.counts = 0, [], 0

    def __call__(self, batch, output):
        places = range(self.seen, self.seen + len(batch["label"]))
        self.rows += rows_of(batch, output, [i for i, place in enumerate(places) if place in self.chosen])
        self.seen = places.stop
        if output.get("pred_mask") is not None:
            pred, mask = output["pred_mask"].detach()[..., ::2, ::2], batch["mask"][..., ::2, ::2]
            bins = pred.float().clamp(0, 1).mul(BINS - 1).floor() + BINS * mask
            bins.masked_fill_(~valid_area(mask, (batch["shape"] + 1) // 2), -1)  # which is not counted
            self.counts = self.counts + bins.histc(2 * BINS, 0, 2 * BINS).double()  # nothing waits for a GPU here

    def write(self, writer, tag, step):
        """Write to a SummaryWriter, None on ranks above 0; every rank calls it."""
        counts = sum(ddp.gather(np.asarray(torch.as_tensor(self.counts).cpu())))
        if writer is None:
            return
        write_rows(writer, tag, self.rows, step)
        if not np.ndim(counts):  # the model predicts no masks
            return
        fp, tp = np.cumsum(counts.reshape(2, -1)[:, ::-1], axis=1)[:, ::-1]  # at or above each threshold
        if tp[0]:
            writer.add_pr_curve_raw(f"{tag}/pixels", tp, fp, fp[0] - fp, tp[0] - tp, tp / np.maximum(tp + fp, 1),
                                    tp / tp[0], step, BINS)
