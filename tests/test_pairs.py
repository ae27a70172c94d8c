"""tools/make_pairs.py: pairing by name and the recipes for public sets. Run: python -m pytest tests/test_pairs.py"""
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from conftest import run_here, run_script
from data import list_images, pair_by_name
from registry import UserError

AREA = np.zeros((12, 16), bool)  # the tampered region of every mask
AREA[3:9, 2:7] = True


def write(path, pixels=None):
    """Write an image (grey by default), whatever the case of its extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((12, 16, 3), 90, np.uint8) if pixels is None else np.asarray(pixels, np.uint8)
    flags = [cv2.IMWRITE_JPEG_QUALITY, 100] if path.suffix.lower() in (".jpg", ".jpeg") else []
    path.write_bytes(cv2.imencode(path.suffix.lower(), pixels, flags)[1].tobytes())


def tree(root, *names):
    """Write images; a name that holds "gt", "mask" or "forged" gets a 0/255 mask."""
    for name in names:
        is_mask = any(word in name.lower() for word in ("_gt", "mask", "forged."))
        write(root / name, AREA * 255 if is_mask else None)


def run_pairs(output, **flags):
    """Run the tool; returns the CompletedProcess. A flag's value is a text, a path or True."""
    words = [word for flag, value in flags.items() for word in (f"--{flag}", value) if word is not True]
    return run_here("tools/make_pairs.py", "--output", output, *words)


def pairs(output, **flags):
    """Run the tool with success; returns the JSON's rows and what it printed."""
    done = run_pairs(output, **flags)
    assert done.returncode == 0, done.stderr
    return json.loads(Path(output).read_text()), done.stdout


def refused(output, **flags):
    """Run the tool with a mistake; returns what it printed, the one sentence of the error last."""
    done = run_pairs(output, **flags)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stdout + done.stderr


def read_area(path):
    """The loader's view of a mask: mean of channels > 127.5."""
    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    return (pixels if pixels.ndim == 2 else pixels[..., :3].mean(axis=2)) > 127.5


# pair_by_name and list_images


def test_pairs_by_name_in_mixed_styles():
    images = ["a.JPG", "b.1.x.tif", "dining table_7.png", "sub/c.jpg", "d_gt.png", "E.bmp", "lone.png"]
    masks = ["a_GT.png", "b.1.x_mask.PNG", "dining table_7.png", "Sub/C_edgemask.jpg", "d_gt.bmp", "e-mask.webp",
             "z.png", "dining table_7_gt.png"]
    found, images_left, masks_left = pair_by_name(images, masks)
    assert found == [("a.JPG", "a_GT.png"), ("b.1.x.tif", "b.1.x_mask.PNG"),
                     ("dining table_7.png", "dining table_7.png"),  # the stem itself goes before stem + suffix
                     ("sub/c.jpg", "Sub/C_edgemask.jpg"), ("d_gt.png", "d_gt.bmp"), ("E.bmp", "e-mask.webp")]
    assert images_left == ["lone.png"] and masks_left == ["z.png", "dining table_7_gt.png"]


def test_only_the_last_extension_is_stripped():
    assert pair_by_name(["x.0288.jpg", "x.0289.jpg"], ["x.0289_gt.png", "x_gt.png"]) == (
        [("x.0289.jpg", "x.0289_gt.png")], ["x.0288.jpg"], ["x_gt.png"])


def test_upper_and_lower_case_of_a_stem_count_when_both_exist():
    assert pair_by_name(["A.png", "a.png"], ["a_gt.png", "A_gt.png"])[0] == [
        ("A.png", "A_gt.png"), ("a.png", "a_gt.png")]


def test_another_folder_is_accepted_for_a_unique_stem_only():
    assert pair_by_name(["CM/1.jpg", "2.jpg"], ["Sp/1_gt.png", "x/y/2.png"])[0] == [
        ("CM/1.jpg", "Sp/1_gt.png"), ("2.jpg", "x/y/2.png")]
    assert pair_by_name(["a/1.jpg"], ["b/1.png", "c/1.png"]) == ([], ["a/1.jpg"], ["b/1.png", "c/1.png"])
    # b/1 and c/1 are what is left, but `1` is not a unique name here
    assert pair_by_name(["a/1.jpg", "b/1.jpg"], ["a/1.png", "c/1.png"]) == (
        [("a/1.jpg", "a/1.png")], ["b/1.jpg"], ["c/1.png"])
    assert pair_by_name(["a/x_gt.jpg", "b/x.jpg"], ["a/x_gt.png", "c/x_mask.png"])[1:] == (
        ["b/x.jpg"], ["c/x_mask.png"])
    # a/x has its mask already
    assert pair_by_name(["a/x.jpg", "y.jpg"], ["a/x_gt.png", "c/x.png"]) == (
        [("a/x.jpg", "a/x_gt.png")], ["y.jpg"], ["c/x.png"])


@pytest.mark.parametrize("images, masks", [
    (["x.jpg"], ["x_gt.png", "x_mask.png"]),
    (["x.jpg"], ["x.bmp", "x.png"]),
    (["x.jpg", "x.tif"], ["x_gt.png"]),
])
def test_two_claims_on_one_name_are_refused_with_their_names(images, masks):
    with pytest.raises(UserError) as error:
        pair_by_name([*images, "good.jpg"], [*masks, "good.png"])
    assert all(name in str(error.value) for name in images + masks) and "good" not in str(error.value)


def test_columbias_second_mask_is_no_rival():
    assert pair_by_name(["x.tif"], ["x_edgemask.jpg", "x_edgemask_3.jpg"]) == (
        [("x.tif", "x_edgemask.jpg")], [], ["x_edgemask_3.jpg"])


@pytest.mark.parametrize("mask_name", ["a{}/x.{}_gt.png", "other{}/X.{}_MASK.png"])
def test_many_pairs(mask_name):
    images = [f"a{i % 37}/x.{i}.jpg" for i in range(20_000)]
    masks = [mask_name.format(i % 37, i) for i in reversed(range(20_000))]
    found, images_left, masks_left = pair_by_name(images, masks)
    assert [image for image, _ in found] == images and not images_left and not masks_left
    assert all(image.split(".")[1] == mask.split(".")[1].split("_")[0] for image, mask in found)


def test_list_images(tmp_path):
    for name in ("b/2.TIFF", "b/a.b.Jpeg", "a 1.webp", ".hidden.png", ".cache/x.png", "readme.txt", "noext"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "3.bmp").touch()
    (tmp_path / "b" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "b" / "loop").symlink_to(tmp_path / "b")
    assert list_images(tmp_path) == ["a 1.webp", "b/2.TIFF", "b/a.b.Jpeg", "b/link/3.bmp", "outside/3.bmp"]


# pairs by folders


def test_folders(tmp_path):
    tree(tmp_path, *(f"Tp/s p/{i}.JPG" for i in range(5)), *(f"CASIA 1.0 groundtruth/s p/{i}_gt.png" for i in range(5)),
         "Au/x.jpg")
    rows, out = pairs(tmp_path / "set.json", image_root=tmp_path / "Tp", mask_root=tmp_path / "CASIA 1.0 groundtruth",
                      authentic_root=tmp_path / "Au")
    assert rows == [*([f"Tp/s p/{i}.JPG", f"CASIA 1.0 groundtruth/s p/{i}_gt.png"] for i in range(5)),
                    ["Au/x.jpg", "Negative"]]
    assert "5 tampered and 1 authentic" in out and "pair 1: Tp/s p/0.JPG" in out and "pair 5: " in out


def test_paths_are_absolute_when_the_json_lies_elsewhere(tmp_path):
    tree(tmp_path, "Tp/1.jpg", "Gt/1.png")
    rows, _ = pairs(tmp_path / "lists" / "set.json", image_root=tmp_path / "Tp", mask_root=tmp_path / "Gt")
    assert rows == [[str(tmp_path / "Tp/1.jpg"), str(tmp_path / "Gt/1.png")]]


def test_extra_image_and_missing_mask_are_listed_and_refused(tmp_path):
    tree(tmp_path, *(f"Tp/{i}.jpg" for i in range(4)), "Gt/0_gt.png", "Gt/1_mask.PNG", "Gt/3.png", "Gt/7_gt.png")
    flags = dict(image_root=tmp_path / "Tp", mask_root=tmp_path / "Gt")
    out = refused(tmp_path / "set.json", **flags)
    assert "images without a mask (1) and masks without an image (1)" in out
    assert "\n  2.jpg" in out and "\n  7_gt.png" in out and not (tmp_path / "set.json").exists()
    rows, _ = pairs(tmp_path / "set.json", skip_unpaired=True, **flags)
    assert rows == [["Tp/0.jpg", "Gt/0_gt.png"], ["Tp/1.jpg", "Gt/1_mask.PNG"], ["Tp/3.jpg", "Gt/3.png"]]


def test_a_long_list_goes_to_a_file(tmp_path):
    tree(tmp_path, *(f"Tp/{i:02}.png" for i in range(30)), "Gt/00.png")
    _, out = pairs(tmp_path / "set.json", image_root=tmp_path / "Tp", mask_root=tmp_path / "Gt", skip_unpaired=True)
    assert "images without a mask (29)" in out and "20.png" in out and "21.png" not in out
    assert (tmp_path / "set_images_without_a_mask.txt").read_text().split() == [f"{i:02}.png" for i in range(1, 30)]


def test_masks_beside_the_images_and_roots_inside_each_other(tmp_path):
    folder = tmp_path / "a"
    tree(folder, "1.jpg", "1_mask.png", "surgical_mask.jpg", "surgical_mask_mask.png", "masks/2.png", "2.png",
         "real/3.jpg")
    out = refused(tmp_path / "x.json", image_root=folder, mask_root=folder, authentic_root=folder / "masks")
    assert "without a mask (2)" in out  # 2.png and real/3.jpg
    rows, _ = pairs(tmp_path / "x.json", image_root=folder, mask_root=folder, authentic_root=folder / "real",
                    skip_unpaired=True)
    assert rows == [["a/1.jpg", "a/1_mask.png"], ["a/surgical_mask.jpg", "a/surgical_mask_mask.png"],
                    ["a/real/3.jpg", "Negative"]]
    rows, _ = pairs(tmp_path / "y.json", image_root=folder, mask_root=folder / "masks", skip_unpaired=True)
    assert rows == [["a/2.png", "a/masks/2.png"]]


@pytest.mark.parametrize("link, target, mask_root", [("Tp/masks", "Gt", "Tp/masks"), ("other", "Tp", "other/Gt")])
def test_a_mask_folder_below_the_images_through_a_link(tmp_path, link, target, mask_root):
    tree(tmp_path, "Tp/1.jpg", "Tp/2.jpg", *(f"{'Gt' if link == 'Tp/masks' else 'Tp/Gt'}/{n}_gt.png" for n in (1, 2)))
    (tmp_path / link).symlink_to(tmp_path / target)
    rows, _ = pairs(tmp_path / "set.json", image_root=tmp_path / "Tp", mask_root=tmp_path / mask_root)
    assert rows == [[f"Tp/{n}.jpg", f"{mask_root}/{n}_gt.png"] for n in (1, 2)]


@pytest.mark.parametrize("below, image_root, folder", [
    ("CocoGlide/real", "CocoGlide/real", "real"), ("CocoGlide/real", "CocoGlide", "real"),
    ("set/Au/x", "set", "Au")])
def test_masks_with_the_names_of_authentic_images(tmp_path, below, image_root, folder):
    tree(tmp_path, f"{below}/dining table_114871.png", "fake/glide_inpainting_val2017_114871_up.png",
         "mask/dining table_114871_mask.png")
    out = refused(tmp_path / "x.json", image_root=tmp_path / image_root, mask_root=tmp_path / "mask",
                  skip_unpaired=True)
    assert "images with a mask (1)" in out and f"a folder named {folder}," in out
    assert "--authentic_root" in out and "--recipe cocoglide" in out


def test_folders_of_authentic_images_that_matter_not(tmp_path):
    root = tmp_path / "real"  # above --image_root
    tree(root, "Tp/1.jpg", "Tp/original/2.jpg", "Tp/realistic/3.jpg", "Gt/1.png", "Gt/3.png")
    rows, _ = pairs(tmp_path / "x.json", image_root=root / "Tp", mask_root=root / "Gt", skip_unpaired=True)
    assert rows == [["real/Tp/1.jpg", "real/Gt/1.png"], ["real/Tp/realistic/3.jpg", "real/Gt/3.png"]]


def test_an_existing_output_stays_unless_overwrite(tmp_path):
    tree(tmp_path, "Tp/1.jpg", "Gt/1.png")
    (tmp_path / "set.json").write_text("mine")
    flags = dict(image_root=tmp_path / "Tp", mask_root=tmp_path / "Gt")
    assert "--overwrite" in refused(tmp_path / "set.json", **flags)
    assert (tmp_path / "set.json").read_text() == "mine"
    assert len(pairs(tmp_path / "set.json", overwrite=True, **flags)[0]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Gt", "Tp", "set.json"]  # no temporary file stays


def test_a_file_name_that_is_no_text(tmp_path):
    name = b"\xff1".decode("utf-8", "surrogateescape")
    try:
        tree(tmp_path, f"Tp/{name}.jpg", "Gt/2.png", f"Gt/{name}.png", "Tp/3.jpg")
    except OSError:
        pytest.skip("this file system takes text only")
    done = run_script("tools/make_pairs.py", "--image_root", "Tp", "--mask_root", "Gt", "--output", "set.json",
                      "--skip_unpaired", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "set.json").read_text()) == [[f"Tp/{name}.jpg", f"Gt/{name}.png"]]


@pytest.mark.parametrize("flags, message", [
    ("--image_root {0}/none --mask_root {0}/Gt --output {0}/x.json", "none"),
    ("--image_root {0}/empty --mask_root {0}/Gt --output {0}/x.json", "--image_root"),
    ("--image_root {0}/Tp --mask_root {0}/empty --output {0}/x.json", "--mask_root"),
    ("--image_root {0}/Tp --mask_root {0}/Gt --authentic_root {0}/Tp --output {0}/x.json", "--authentic_root"),
    ("--image_root {0}/Tp --mask_root {0}/Gt --output {0}/Tp/1.jpg/x.json", "can't be written"),
    ("--image_root {0}/Tp --mask_root {0}/Gt --output {0}/x.txt", ".json"),
    ("--image_root {0}/Tp --output {0}/x.json", "--mask_root is missing"),
    ("--image_root {0}/Tp --mask_root {0}/other --output {0}/x.json --skip_unpaired", "no image and mask agree"),
    ("--recipe columbia --root {0} --output {0}/x.json", "{0}/x_masks"),
    ("--recipe casia1 --root {0} --output {0}/x.json", "holds no CASIAv1"),
    ("--recipe nist16 --root {0}/Tp --output {0}/x.json", "no tables"),
    ("--recipe dso1 --root {0}/none --output {0}/x.json", "none"),
    ("--recipe dso1 --image_root {0}/Tp --output {0}/x.json", "--root is missing"),
    ("--recipe casia3 --root {0}/Tp --output {0}/x.json", "casia2"),
    ("--list {0}/list.txt --output {0}/x.json", "--root is missing"),
    ("--list {0}/none.txt --root {0} --output {0}/x.json", "none.txt"),
    ("--list {0}/Tp --root {0} --output {0}/x.json", "a text file"),
    ("--list {0}/list.txt --root {0} --mask_root {0}/Gt --output {0}/x.json", "--mask_root does not belong here"),
    ("--list {0}/list.txt --root {0} --recipe casia1 --authentic --output {0}/x.json", "--authentic does not belong"),
    ("--image_root {0}/Tp --mask_root {0}/Gt --authentic --output {0}/x.json", "--authentic does not belong here"),
])
def test_a_mistake_gives_one_sentence_and_exit_code_1(tmp_path, flags, message):
    tree(tmp_path, "Tp/1.jpg", "Gt/1.png", "other/7.png")
    (tmp_path / "empty").mkdir()
    done = run_here("tools/make_pairs.py", *flags.format(tmp_path).split())
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message.format(tmp_path) in done.stderr and not (tmp_path / "x.json").exists()


# Recipes, each on a small tree of the set's layout


def recipe(name, root, **flags):
    """Run a recipe into a folder beside `root`, which it must not change; returns rows and printed text as `pairs`.

    Paths in the rows are relative to `root` where they lie below it.
    """
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    rows, out = pairs(root.parent / f"lists/{name}.json", recipe=name, root=root, overwrite=True, **flags)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    return [[part.removeprefix(f"{root}/") for part in row] for row in rows], out


def refused_recipe(name, root):
    """Run a recipe that must fail; returns what it printed."""
    return refused(root.parent / f"lists/{name}.json", recipe=name, root=root, overwrite=True)


def test_columbia(tmp_path):
    root = tmp_path / "Columbia"
    colours = np.zeros((12, 16, 3), np.uint8)  # BGR
    colours[:] = (0, 0, 200)  # red: host
    colours[AREA] = (0, 200, 0)
    colours[0:2] = (0, 0, 255)
    colours[3, 2:7] = (0, 255, 0)  # bright green near the seam
    stems = "canong3_canonxt_sub_16", "nikond70_canonxt_sub_13"
    for stem in stems:
        tree(root, f"4cam_splc/4cam_splc/{stem}.tif")  # the folder as archives double it
        write(root / f"4cam_splc/4cam_splc/edgemask/{stem}_edgemask.jpg", colours)
        write(root / f"4cam_splc/4cam_splc/edgemask/{stem}_edgemask_3.jpg", 255 - colours)
    tree(root, "4cam_auth/canonxt_29_sub_07.tif")
    write(root / "4cam_auth/edgemask/canonxt_29_sub_07_edgemask.jpg", colours)
    rows, out = recipe("columbia", root)
    masks = "columbia_masks/4cam_splc/4cam_splc/edgemask/"
    assert rows == [*([f"4cam_splc/4cam_splc/{stem}.tif", f"{masks}{stem}_edgemask.png"] for stem in stems),
                    ["4cam_auth/canonxt_29_sub_07.tif", "Negative"]]
    assert "expected 180 tampered" in out and "found 2" in out and "expected 183 authentic" in out and "red" in out
    area = read_area(tmp_path / "lists" / rows[0][1])
    assert set(np.unique(cv2.imread(str(tmp_path / "lists" / rows[0][1]), cv2.IMREAD_UNCHANGED))) == {0, 255}
    # JPEG halves the colour resolution, so the outline may move by a pixel
    assert (area == AREA)[cv2.morphologyEx(AREA.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3))) == 0].all()


def test_coverage(tmp_path):
    root = tmp_path / "COVERAGE"
    for n in ("1", "10", "41"):
        masks = (f"mask/{n}{kind}.tif" for kind in ("copy", "paste", "forged"))
        tree(root, f"image/{n}.tif", f"image/{n}t.tif", *masks)
    write(root / "mask/41forged.tif", np.zeros((10, 16)))  # a published fault
    rows, out = recipe("coverage", root)
    assert rows == [["image/10t.tif", "mask/10forged.tif"], ["image/1t.tif", "mask/1forged.tif"],
                    *([f"image/{n}.tif", "Negative"] for n in ("1", "10", "41"))]
    assert "image/41t.tif 12x16, mask/41forged.tif 10x16" in out and not (tmp_path / "lists/coverage_masks").exists()


TABLE = ["TaskID", "ProbeFileID", "ProbeFileName", "ProbeMaskFileName", "IsTarget", "ProbePostProcessed"]


@pytest.mark.parametrize("delimiter, names", [("|", TABLE), (",", TABLE), (
    "|", ["TaskID", "FileID", "ImgFName", "MaskFName", "isTarget", "AnalysisJSON"])])
def test_nist16(tmp_path, delimiter, names):
    root = tmp_path / "NIST16"
    base = root / "NC2016_Test0613"
    lines = [delimiter.join(names)]
    for probe, mask, target in (("0128", "3942", "Y"), ("0130", "3942", "Y"), ("0222", "5779", "Y"), ("0500", "", "N")):
        tree(base, f"probe/NC2016_{probe}.jpg", "world/NC2016_3272.jpg")
        mask = mask and f"reference/manipulation/mask/NC2016_{mask}.png"
        lines.append(delimiter.join(["manipulation", probe, f"probe/NC2016_{probe}.jpg", mask, target, "none"]))
        if mask:
            write(base / mask, ~AREA * 255)
    write(base / "reference/splice/mask/NC2016_3942.png", AREA * 255)
    (base / "reference/manipulation/NC2016-manipulation-ref.csv").write_text("\r\n".join(lines) + "\r\n")
    (base / "reference/splice/NC2016-splice-ref.csv").write_text("nothing")
    rows, out = recipe("nist16", root)
    folder = "nist16_masks/NC2016_Test0613/reference/manipulation/mask/"
    assert rows == [[f"NC2016_Test0613/probe/NC2016_{probe}.jpg", f"{folder}NC2016_{mask}.png"] for probe, mask in
                    (("0128", "3942"), ("0130", "3942"), ("0222", "5779"))] + [
                        ["NC2016_Test0613/probe/NC2016_0500.jpg", "Negative"]]
    assert all(np.array_equal(read_area(tmp_path / "lists" / mask), AREA) for _, mask in rows[:3])
    assert "expected 564 tampered" in out and "expected 282 masks, found 2" in out
    (base / "probe/NC2016_0130.jpg").unlink()
    out = refused_recipe("nist16", root)
    assert "without a mask (1)" in out and "NC2016_0130.jpg" in out
    assert len(recipe("nist16", root, skip_unpaired=True, tampered_only=True)[0]) == 2


def test_a_table_without_its_columns(tmp_path):
    tree(tmp_path, "set/probe/1.jpg")
    table = tmp_path / "set/reference/manipulation/NC2016-manipulation-ref.csv"
    table.parent.mkdir(parents=True)
    for text in ("", "TaskID|ProbeFileName\n1|2\n"):
        table.write_text(text)
        assert "ProbeMaskFileName" in refused_recipe("nist16", tmp_path / "set")


CASIA1 = [  # stem of a mask, with its folder; the original name of the image where it differs
    ("CM/Sp_S_CNN_A_nat0078_nat0078_0004", ""), ("CM/Sp_S_NNN_C_txt0004_txt0004_0004", ""),  # one number, four times
    ("CM/Sp_S_NNN_R_txt0004_txt0004_0004", ""), ("CM/Sp_S_NNN_T_txt0004_txt0004_0004", ""),
    ("CM/Sp_S_NNN_R_arc0003_arc0003_0051", "CM/Sp_S_NNN_R_arc0003_arc0004_0051"),
    ("CM/Sp_S_NRD_A_pla0075_pla0075_0588", "Sp/Sp_D_NRD_A_pla0075_pla0075_0588"),
    ("Sp/Sp_D_NNN_A_ani0099_ani0100.0288", ""),
    ("Sp/Sp_D_NRD_A_ani0040_ani0054_0257", "CM/Sp_S_NRD_A_ani0040_ani0054.0257"),
    ("Sp/Sp_D_NRN_A_cha0037_cha0043_0513", "Sp/Sp_D_NRN_A_cha0037_cha0037_0513"),
]
WITHOUT_MASK = "Sp/Sp_D_NRN_A_cha0011_sec0011_0542"


@pytest.mark.parametrize("tampered, truth, flat, old_names", [
    ("Tp", "CASIA 1.0 groundtruth", False, False), ("Modified Tp/Tp", "CASIA 1.0 groundtruth", False, False),
    ("Tp", "Gt", True, False), ("Tp", "CASIA 1.0 groundtruth", False, True),
    ("CASIA 1.0 dataset/Modified Tp/Tp", "CASIA 1.0 groundtruth/CASIA 1.0 groundtruth", False, False)])
def test_casia1(tmp_path, tampered, truth, flat, old_names):
    root, found = tmp_path / "CASIA 1.0", {}
    for stem, old in CASIA1:
        stem, old = (name.rpartition("/")[2] if flat else name for name in (stem, old))
        image, mask = f"{tampered}/{old if old and old_names else stem}.jpg", f"{truth}/{stem}_gt.png"
        tree(root, image, mask)
        found[image] = mask
    tree(root, f"{tampered}/{WITHOUT_MASK.rpartition('/')[2] if flat else WITHOUT_MASK}.jpg", "Au/Au_ani_0001.jpg",
         "Au/Au_cha_0047.JPG")
    rows, out = recipe("casia1", root)
    assert rows == [*([image, found[image]] for image in sorted(found)),
                    ["Au/Au_ani_0001.jpg", "Negative"], ["Au/Au_cha_0047.JPG", "Negative"]]
    assert "0542.jpg was published without a mask" in out
    assert ("4 pairs whose names agree in their number only" in out) == old_names
    assert "expected 920 tampered images with a mask, found 9" in out


def test_casia1_with_original_and_modified_images_together(tmp_path):
    root = tmp_path / "CASIA 1.0"
    for stem, old in CASIA1:
        tree(root, f"Modified Tp/{stem}.jpg", f"Original Tp/{old or stem}.jpg", f"Gt/{stem}_gt.png")
    out = refused_recipe("casia1", root)
    assert f"holds images of CASIAv1 more than once ({len(CASIA1)})" in out and "original and modified images" in out
    assert f"Modified Tp/{CASIA1[0][0]}.jpg and Original Tp/{CASIA1[0][0]}.jpg" in out and "(Original Tp)" in out


def test_only_one_image_of_casia1_has_no_mask_by_right(tmp_path):
    root = tmp_path / "CASIA 1.0"
    tree(root, f"Tp/{CASIA1[0][0]}.jpg", f"Gt/{CASIA1[0][0]}_gt.png", "Tp/Sp_D_NND_R_cha0012_sec0011_0542.jpg",
         f"Tp/{WITHOUT_MASK}.jpg")
    assert "images without a mask (1):\n  Tp/Sp_D_NND_R" in refused_recipe("casia1", root)
    tree(root, f"copy/{CASIA1[0][0]}_gt.png")
    assert "holds masks of CASIAv1 more than once (1)" in refused_recipe("casia1", root)


def test_casia2(tmp_path):
    root, gt = tmp_path / "CASIA2", "CASIA 2 Groundtruth"
    tree(root, "Tp/Tp_D_CRN_M_N_pla00035_pla00033_10997.jpg", f"{gt}/Tp_D_CRN_M_N_pla00035_pla00033_10997_gt.png",
         "Tp/Tp_S_CnN_S_N_txt00071_txt00071_01297.tif", f"{gt}/Tp_D_CNN_S_N_txt00071_xxx00001_01297_gt.png",
         "Tp/Tp_D_NRD_S_N_cha10002_cha10001_20094.jpg", f"{gt}/Tp_D_NRD_S_N_cha10002_cha10001_20094_gt3.png",
         "jpg/Tp_S_CnN_S_N_txt00071_txt00071_01297.jpg", "jpg/Au_ind_00002.jpg",  # copies that CAT-Net's script makes
         "Tp/Tp_S_NNN_S_N_sec00012_sec00012_11230.jpg", "Au/Au_ani_00001.jpg", "Au/Au_ind_00002.bmp")
    write(root / gt / "Tp_S_NNN_S_N_sec00012_sec00012_11230_gt.png", AREA.T * 255)  # turned, as published
    rows, out = recipe("casia2", root)
    assert [[Path(part).name for part in row] for row in rows] == [
        ["Tp_D_CRN_M_N_pla00035_pla00033_10997.jpg", "Tp_D_CRN_M_N_pla00035_pla00033_10997_gt.png"],
        ["Tp_D_NRD_S_N_cha10002_cha10001_20094.jpg", "Tp_D_NRD_S_N_cha10002_cha10001_20094_gt3.png"],
        ["Tp_S_CnN_S_N_txt00071_txt00071_01297.tif", "Tp_D_CNN_S_N_txt00071_xxx00001_01297_gt.png"],
        ["Au_ani_00001.jpg", "Negative"], ["Au_ind_00002.bmp", "Negative"]]
    assert f"_11230.jpg 12x16, {gt}/Tp_S_NNN_S_N_sec00012_sec00012_11230_gt.png 16x12" in out
    assert "1 pair whose names agree in their number only" in out and "unverified" in out


def test_imd2020(tmp_path):
    root = tmp_path / "IMD2020"
    tree(root, "1b8r7b/1b8r7b_orig.jpg", "1b8r7b/c94scmh_0.jpg", "z14/00030_orig.jpg", "z14/00030_fake.png",
         "0jpg/x.jpg")
    soft = np.zeros((12, 16, 4), np.uint8)
    soft[AREA] = (0, 40, 0, 0)  # a soft value; alpha says nothing
    soft[~AREA, 3] = 255
    write(root / "1b8r7b/c94scmh_0_mask.png", soft)
    write(root / "z14/00030_fake_mask.png", AREA)  # 0/1
    rows, out = recipe("imd2020", root)
    assert rows == [["1b8r7b/c94scmh_0.jpg", "imd2020_masks/1b8r7b/c94scmh_0_mask.png"],
                    ["z14/00030_fake.png", "imd2020_masks/z14/00030_fake_mask.png"],
                    ["1b8r7b/1b8r7b_orig.jpg", "Negative"], ["z14/00030_orig.jpg", "Negative"]]
    assert all(np.array_equal(read_area(tmp_path / "lists" / mask), AREA) for _, mask in rows[:2])
    assert "expected 2010 tampered" in out


def test_dso1(tmp_path):
    root = tmp_path / "tifs-database"
    tree(root, "DSO-1/normal-07.png", "DSO-1/splicing-07.png", "DSO-1/splicing-100.png", "DSI-1/splicing-07.png")
    write(root / "DSO-1-Fake-Images-Masks/splicing-07.png", np.where(AREA, 0, 255))
    colours = np.where(AREA[..., None], (100, 127, 100), (255, 255, 140))
    write(root / "DSO-1-Fake-Images-Masks/splicing-100.png", colours)
    rows, _ = recipe("dso1", root, mask_output=tmp_path / "elsewhere")
    masks = f"{tmp_path}/elsewhere/DSO-1-Fake-Images-Masks/"
    assert rows == [*([f"DSO-1/splicing-{n}.png", f"{masks}splicing-{n}.png"] for n in ("07", "100")),
                    ["DSO-1/normal-07.png", "Negative"]]
    assert all(np.array_equal(read_area(tmp_path / "lists" / mask), AREA) for _, mask in rows[:2])


@pytest.mark.parametrize("name, quality", [("autosplice", 100), ("autosplice90", 90), ("autosplice75", 75)])
def test_autosplice(tmp_path, name, quality):
    root = tmp_path / "AutoSplice"
    tree(root, *(f"Forged_JPEG{q}/{stem}.jpg" for q in (100, 90, 75) for stem in ("39406_0", "39406_1", "40574_2")),
         "Authentic/39406.jpg")
    for stem in ("39406", "40574"):
        write(root / f"Mask/{stem}_mask.png", AREA * 3)
    rows, _ = recipe(name, root)
    assert rows == [[f"Forged_JPEG{quality}/{stem}.jpg", f"{name}_masks/Mask/{stem[:5]}_mask.png"] for stem in
                    ("39406_0", "39406_1", "40574_2")] + [["Authentic/39406.jpg", "Negative"]]
    assert all(np.array_equal(read_area(tmp_path / "lists" / mask), AREA) for _, mask in rows[:3])


@pytest.mark.parametrize("name, tampered, authentic, other", [
    ("cocoglide", {"fake/glide_inpainting_val2017_114871_up.png": "mask/dining table_114871_mask.png",
                   "fake/glide_inpainting_val2017_139_up.png": "mask/tv_139_mask.png"},
     ["real/dining table_114871.png", "real/tv_139.png"], []),
    ("openforensics", {"Images/Test-Dev/00c4bd8a4f.jpg": "Annotations_GT/Images/Test-Dev/00c4bd8a4f.png"}, [], []),
    ("tampcoco", {
        "bcm_images/62_000000107436.jpg_000000107436.jpg_RS1.06.jpg":
            "bcm_masks/62_000000107436.png_000000107436.png_RS1.06.png",
        "bcmc_images/62_000000107436_aligned_Q76.jpg_000000107436_aligned_Q76.jpg_RS1.06_aligned_Q76.jpg":
            "bcm_masks/62_000000107436.png_000000107436.png_RS1.06.png",
        "cm_images/90_000000484327.jpg_000000484327.jpg_RS1.18.jpg":
            "cm_masks/90_000000484327.png_000000484327.png_RS1.18.png",
        "sp_images/90_000000484327.jpg_000000484327.jpg_RS1.18.jpg":  # the name alone is not unique
            "sp_masks/90_000000484327.png_000000484327.png_RS1.18.png"}, [], []),
    ("tampcoco_bcmc", {
        "bcmc_images/98_000000418435_aligned_Q76.jpg_000000418435_aligned_Q76.jpg_aligned_Q76.jpg":
            "bcm_masks/98_000000418435.png_000000418435.png.png"},
     [], ["bcm_images/98_000000418435.jpg_000000418435.jpg.jpg", "sp_images/1.jpg_2.jpg.jpg"]),
    ("defacto", {
        "Copy-Move-images/img/1_000000262147.tif": "Copy-Move-annotations/probe_mask/1_000000262147.jpg",
        "Inpainting-images/img/1_000000262147.tif": "Inpainting-annotations/probe_mask/1_000000262147.tif",
        "Splicing-1-images/img/1_000000262147.tif": "Splicing-1-annotations/probe_mask/1_000000262147.jpg",
        "Splicing-images-2/img/1_000000262147.tif": "Splicing-annotations-2/probe_mask/1_000000262147.jpg"},
     [], ["Splicing-1-annotations/donor_mask/1_000000262147.tif"]),
    ("comofod", {"001_F.png": "001_B.png", "200_F.png": "200_B.png"}, ["001_O.png", "200_O.png"],
     ["001_M.png", "001_F_JC1.jpg", "001_O_JC1.jpg", "0jpg/001_F.jpg"]),
])
def test_recipes_whose_masks_stay_as_they_are(tmp_path, name, tampered, authentic, other):
    root = tmp_path / "set"
    tree(root, *tampered, *authentic, *other)
    for mask in tampered.values():
        write(root / mask, AREA * 255)
    rows, out = recipe(name, root)
    assert rows == sorted(map(list, tampered.items())) + [[image, "Negative"] for image in authentic]
    assert "unverified" in out


def test_fantasticreality(tmp_path):
    root = tmp_path / "dataset"
    stem, other = "IMG_0007962_IMG_0007497", "IMG_0008049_IMG_0003631"
    tree(root, f"ColorFakeImages/{stem}.jpg", f"ColorFakeImages/{other}.jpg", "ColorRealImages/IMG_0002289.jpg")
    (root / "SegmentationFake").mkdir()
    np.savez_compressed(root / f"SegmentationFake/{stem}.npz", (AREA * 3)[None, ..., None])
    np.savez(root / f"SegmentationFake/{other}.npz", AREA.T * 3.0)  # of another size
    rows, out = recipe("fantasticreality", root)
    assert rows == [[f"ColorFakeImages/{stem}.jpg", f"fantasticreality_masks/SegmentationFake/{stem}.png"],
                    ["ColorRealImages/IMG_0002289.jpg", "Negative"]]
    assert np.array_equal(read_area(tmp_path / "lists" / rows[0][1]), AREA)
    assert f"{other}.jpg 12x16, SegmentationFake/{other}.npz 16x12" in out and "expected 19423 tampered" in out


def test_a_broken_array_of_fantasticreality(tmp_path):
    root = tmp_path / "dataset"
    masks = root / "SegmentationFake"
    masks.mkdir(parents=True)
    for name in ("damaged", "objects", "other_key", "row", "text"):
        write(root / f"ColorFakeImages/{name}.jpg", np.zeros((120, 160, 3)))
    np.savez(masks / "objects.npz", np.zeros((120, 160), object))
    np.savez(masks / "other_key.npz", mask=np.zeros((120, 160)))
    np.savez(masks / "row.npz", np.zeros(120))
    (masks / "text.npz").write_text("nothing")
    np.savez(masks / "damaged.npz", np.zeros((120, 160), bool))
    data = bytearray((masks / "damaged.npz").read_bytes())
    data[9000] = 1  # far behind the header, so that only the checksum tells
    (masks / "damaged.npz").write_bytes(data)
    out = refused_recipe("fantasticreality", root)
    assert all(f"SegmentationFake/{name}.npz unreadable" in out for name in ("other_key", "row", "text"))
    assert "damaged.npz: no array arr_0 can be read" in out
    (root / "ColorFakeImages/damaged.jpg").unlink()
    (masks / "damaged.npz").unlink()
    assert "objects.npz: no array arr_0 can be read" in refused_recipe("fantasticreality", root)


def test_korus(tmp_path):
    root = tmp_path / "set"
    levels = np.where(AREA, 255, 0)
    levels[3:5, 2:7] = 120  # collateral change
    levels[0] = 8
    for camera, stem in (("Canon_60D", "DPP0520"), ("Sony_A57", "DPP0520")):
        write(root / f"{camera}/tampered-realistic/{stem}.TIF")
        write(root / f"{camera}/pristine/{stem}.TIF")
        write(root / f"{camera}/ground-truth/{stem}.PNG", levels)
    rows, out = recipe("korus", root)
    assert rows == [*([f"{camera}/tampered-realistic/DPP0520.TIF", f"korus_masks/{camera}/ground-truth/DPP0520.png"]
                      for camera in ("Canon_60D", "Sony_A57")),
                    *([f"{camera}/pristine/DPP0520.TIF", "Negative"] for camera in ("Canon_60D", "Sony_A57"))]
    assert all(np.array_equal(read_area(tmp_path / "lists" / mask), AREA) for _, mask in rows[:2])
    assert "above 10" in out and "expected 220 tampered" in out


def test_the_published_numbers_give_no_warning(tmp_path):
    tree(tmp_path / "set", *(f"DSO-1/{kind}-{n:02}.png" for kind in ("splicing", "normal") for n in range(1, 101)),
         *(f"DSO-1-Fake-Images-Masks/splicing-{n:02}.png" for n in range(1, 101)))
    rows, out = recipe("dso1", tmp_path / "set")
    assert len(rows) == 200 and "warning" not in out


def test_converted_masks_do_not_go_over_other_files(tmp_path):
    root = tmp_path / "set"
    tree(root, "DSO-1/splicing-07.png", "DSO-1-Fake-Images-Masks/splicing-07.png")
    for flags in (dict(output=tmp_path / "x.json", mask_output=root), dict(output=root / "x.json"),
                  dict(output=tmp_path / "x.json", mask_output=tmp_path)):
        assert "would mix" in refused(recipe="dso1", root=root, **flags)
    tree(tmp_path, "x_masks/mine.png")
    assert "not empty" in refused(tmp_path / "x.json", recipe="dso1", root=root)


def test_a_truncated_mask_is_not_made_into_a_whole_one(tmp_path):
    root = tmp_path / "set"
    tree(root, "DSO-1/splicing-07.png")
    write(root / "DSO-1-Fake-Images-Masks/splicing-07.png", np.random.default_rng(0).integers(0, 256, (12, 16)))
    mask = root / "DSO-1-Fake-Images-Masks/splicing-07.png"
    mask.write_bytes(mask.read_bytes()[:150])
    assert "splicing-07.png is truncated" in refused(tmp_path / "x.json", recipe="dso1", root=root)
    mask.write_bytes(b"")
    assert "no image has the size" in refused(tmp_path / "y.json", recipe="dso1", root=root)


def test_an_exif_turn_explains_a_size(tmp_path):
    root, exif = tmp_path / "set", Image.Exif()
    exif[0x0112] = 6
    names = [f"Sp_D_CND_A_pla0005_pla0023_000{n}" for n in (1, 2)]
    tree(root, *(f"Gt/{name}_gt.png" for name in names))
    (root / "Tp").mkdir()
    Image.new("RGB", (12, 16)).save(root / f"Tp/{names[0]}.jpg", exif=exif)
    Image.new("RGB", (12, 16)).save(root / f"Tp/{names[1]}.jpg")
    assert recipe("casia1", root)[0] == [[f"Tp/{names[0]}.jpg", f"Gt/{names[0]}_gt.png"]]


# Split lists


def listed(root, *texts, **flags):
    """Run the tool over lists of these texts; returns the JSON's rows, or None after a mistake, and what it printed."""
    files = []
    for i, text in enumerate(texts):
        files.append(root.parent / f"list{i}.txt")
        files[-1].write_bytes(text.encode())
    words = [word for flag, value in flags.items() for word in (f"--{flag}", value) if word is not True]
    done = run_here("tools/make_pairs.py", "--list", *files, "--root", root, "--output", root / "set.json", *words)
    if done.returncode:
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert "overwrite" in flags or not (root / "set.json").exists()
        return None, done.stdout + done.stderr
    return json.loads((root / "set.json").read_text()), done.stdout


def test_lists_with_commas(tmp_path):
    root = tmp_path / "root"
    tree(root, "CASIA 2.0/Tp/Tp_D_NRN_S_N_sec00064_cha00052_11409.jpg", "CASIA 2.0/Au/Au_nat_30474.jpg",
         "CASIA 2 Groundtruth/Tp_D_NRN_S_N_sec00064_cha00052_11409_gt.png", "image/1.TIF", "mask/1forged.tif")
    tampered = ("CASIA 2.0/Tp/Tp_D_NRN_S_N_sec00064_cha00052_11409.jpg,CASIA 2 Groundtruth/"
                "Tp_D_NRN_S_N_sec00064_cha00052_11409_gt.png,CASIA 2.0/jpg/not there.jpg")
    rows, out = listed(root, f"\ufeff{tampered}\r\n\r\n./{tampered}\r\n", "CASIA 2.0/Au/Au_nat_30474.jpg,None,x\n",
                       f"./{tampered}\nimage\\1.tif, MASK/1forged.tif")
    assert rows == [tampered.split(",")[:2], ["image/1.TIF", "mask/1forged.tif"],
                    ["CASIA 2.0/Au/Au_nat_30474.jpg", "Negative"]]
    assert "list0.txt: pairs 1, authentic 0, without a mask 0, repeated lines 1\n" in out
    assert "list1.txt: pairs 0, authentic 1, without a mask 0\n" in out
    assert listed(root, "CASIA 2.0/Au/Au_nat_30474.jpg,-1", overwrite=True)[0] == [rows[2]]  # authentic alone


def test_lists_with_spaces(tmp_path):
    root = tmp_path / "root"
    tree(root, "2 a/dining table_1.PNG", "2 a/x 5.jpg", "my masks/dining table 1_gt.png", "au/3.jpg", "4.jpg")
    rows, out = listed(root, "2 a/dining table_1.PNG my masks/dining table 1_gt.png 1\nau/3.jpg none 0\n"
                       "4.jpg None 2\n2 a/x 5.jpg -1\n", skip_unpaired=True)
    assert rows == [["2 a/dining table_1.PNG", "my masks/dining table 1_gt.png"], ["au/3.jpg", "Negative"]]
    assert "pairs 1, authentic 1, without a mask 2\n" in out
    assert "images without a mask (2):\n  4.jpg\n  2 a/x 5.jpg" in out
    (root / "set.json").unlink()
    assert "images without a mask (2), listed above" in listed(root, "4.jpg None 2\n2 a/x 5.jpg None 1\n"
                                                                    "au/3.jpg None 0")[1]
    rows, _ = listed(root, "au/3.jpg None au/3.jpg\n4.jpg None")  # without masks and labels all are authentic
    assert rows == [["au/3.jpg", "Negative"], ["4.jpg", "Negative"]]


def test_lists_of_one_column(tmp_path):
    root = tmp_path / "root"
    fake, real = "IMG_0007962_IMG_0007497.jpg", "IMG_0002289.jpg"
    tree(root, f"dataset/ColorFakeImages/{fake}", f"dataset/ColorRealImages/{real}", "dining table_1.png",
         "other/x.jpg")
    (root / "dataset/SegmentationFake").mkdir()
    np.savez(root / "dataset/SegmentationFake/IMG_0007962_IMG_0007497.npz", AREA)
    assert "--authentic" in listed(root, "dining table_1.png")[1] and "--recipe" in listed(root, "other/x.jpg")[1]
    fantastic = dict(recipe="fantasticreality", mask_output=tmp_path / "masks")
    out = listed(root, f"{fake}\nx.jpg\n", **fantastic)[1]
    assert "files that are not there (1; give" in out and "x.jpg (none of the recipe's images)" in out
    rows, out = listed(root, f"{fake}\n", f"ColorRealImages/{real}", **fantastic)
    assert rows == [[f"dataset/ColorFakeImages/{fake}",
                     f"{tmp_path}/masks/dataset/SegmentationFake/IMG_0007962_IMG_0007497.png"],
                    [f"dataset/ColorRealImages/{real}", "Negative"]]
    assert np.array_equal(read_area(rows[0][1]), AREA) and "masks: the array arr_0" in out and "expected" not in out
    rows, _ = listed(root, f"dining table_1.png\nother/x.jpg\ndataset/ColorRealImages/{real}", authentic=True,
                     overwrite=True)
    assert [row[1] for row in rows] == ["Negative"] * 3
    (root / "set.json").unlink()
    array = f"dataset/ColorFakeImages/{fake},dataset/SegmentationFake/IMG_0007962_IMG_0007497.npz"
    assert "--recipe fantasticreality" in listed(root, array)[1]
    assert "leave --authentic out" in listed(root, array, authentic=True)[1]
    tree(root, f"copy/ColorRealImages/{real}")
    assert f"{real} (2 of the recipe's images)" in listed(root, real, overwrite=True, **fantastic)[1]


def test_the_masks_of_a_list_are_converted_by_a_recipe(tmp_path):
    root = tmp_path / "root"
    tree(root, "DSO-1/splicing-58.png", "DSO-1/splicing-01.png", "DSO-1/normal-46.png")
    write(root / "DSO-1-Fake-Images-Masks/splicing-58.png", np.where(AREA, 0, 255))
    write(root / "DSO-1-Fake-Images-Masks/splicing-01.png", np.zeros((10, 16)))  # of another size
    lines = [f"DSO-1/splicing-{n}.png,DSO-1-Fake-Images-Masks/splicing-{n}.png,x.jpg\n" for n in ("58", "01")]
    rows, out = listed(root, "".join(lines), "DSO-1/normal-46.png,None,y.jpg\n", recipe="dso1",
                       mask_output=tmp_path / "masks")
    assert rows == [["DSO-1/splicing-58.png", f"{tmp_path}/masks/DSO-1-Fake-Images-Masks/splicing-58.png"],
                    ["DSO-1/normal-46.png", "Negative"]]
    assert np.array_equal(read_area(rows[0][1]), AREA)
    assert "splicing-01.png 12x16" in out and "inverted" in out and "expected" not in out


def test_an_image_that_lists_give_two_masks(tmp_path):
    root = tmp_path / "root"
    names = [f"probe/NC2016_{n}.jpg" for n in ("5343", "0596", "0128")]
    masks = [f"reference/splice/mask/NC2016_{n}.png" for n in ("1", "2", "3")]
    tree(root, *names, *masks)
    text = "".join(f"{image},{mask},world/\n" for image, mask in zip(names, masks))
    out = listed(root, text + f"{names[0]},{masks[2]},world/", f"{names[1]},None")[1]
    assert "images listed with two masks (2; keep" in out and f"  {names[0]}: {masks[0]} and {masks[2]}\n" in out
    assert f"  {names[1]}: {masks[1]} and Negative\n" in out
    assert len(listed(root, text, text)[0]) == 3


def test_listed_files_that_are_not_there(tmp_path):
    root = tmp_path / "root"
    tree(root, "1.jpg", "1_gt.png", "../outside.jpg")
    lines = "".join(f"{n}.jpg,gone_gt.png\n" for n in range(2, 30))
    out = listed(root, "1.jpg,1_gt.png\n../outside.jpg,1_gt.png\n" + lines)[1]
    assert "files that are not there (30; give" in out and "\n  ../outside.jpg\n  2.jpg\n  gone_gt.png\n" in out
    assert len((root / "set_listed_files_that_are_not_there.txt").read_text().split()) == 30


@pytest.mark.parametrize("text, message", [
    ("1.jpg,1_gt.png\n1.jpg,\n", "line 2 (1.jpg,): can't be split"), (",1_gt.png", "line 1"),
    ("1.jpg  1_gt.png", "can't be split"), ("1.jpg\t1_gt.png", "can't be split"), ("readme", "can't be split"),
    ("1.jpg 1", "a label and no mask"), ("1.jpg,0", "a label and no mask"),
    ("1.jpg,1_gt.png\n\n1.jpg", "line 3 (1.jpg): this line and the first one differ"), ("\r\n \n", "is empty"),
    ("1.jpg,None", "nothing was written"), ("1\0.\0j\0p\0g\0", "save the list as UTF-8")])
def test_malformed_lists(tmp_path, text, message):
    root = tmp_path / "root"
    tree(root, "1.jpg", "1_gt.png")
    assert message in listed(root, text, **{"tampered_only": True} if "None" in text else {})[1]
