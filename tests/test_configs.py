"""The LoRA linear's plans: every shape on every part gets one that fits, choices are visible, files are checked."""

import json
from dataclasses import asdict

import pytest
import torch

from peft_kernels.kernels.lora_linear import configs
from peft_kernels.kernels.lora_linear.configs import PATHS, Config, explain, force, pick_config, read_tuned
from peft_kernels.kernels.lora_linear.parts import PARTS, floors, nearest_part
from peft_kernels.kernels.lora_linear.tiles import KERNELS, Tile, problem

SHAPES = [(1, 4096, 4096), (17, 33, 50), (512, 4096, 4096), (8192, 14336, 4096), (100_000, 8, 16), (0, 64, 64)]
H100 = (8192, 4096, 4096, 16, torch.bfloat16, 90)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", PARTS)
def test_every_plan_fits_its_part(arch, dtype):
    part = PARTS[arch]
    for M, N, K in SHAPES:
        for R in (1, 16, 24, 64, 100, 128, 129, 512):
            config = pick_config(M, N, K, R, dtype, arch)
            assert config.path in PATHS
            assert config.measured is None
            assert config.descriptors == part.descriptors
            for kernel in KERNELS:
                if kernel != "bwd_dy" or config.dy_passes == 1:
                    assert problem(kernel, getattr(config, kernel), R, dtype.itemsize, part) is None


def test_the_same_arguments_give_the_same_plan():
    assert pick_config(*H100) is pick_config(*H100)


def test_the_rank_decides_between_one_and_two_passes_over_dy():
    passes = [pick_config(8192, 4096, 4096, R, torch.bfloat16, 90).dy_passes for R in (1, 16, 32, 128, 129, 1024)]
    assert passes == [1, 1, 1, 2, 2, 2]


def test_fp32_leaves_the_base_product_to_cublas():
    for arch in PARTS:
        assert pick_config(8192, 4096, 4096, 16, torch.float32, arch).path == "beta_one"


def test_few_rows_split_the_columns():
    few, many = (pick_config(M, 4096, 4096, 16, torch.bfloat16, 90).down for M in (16, 65536))
    assert few.span < 4096 <= many.span


def test_an_unknown_part_takes_the_nearest_below_and_says_so():
    assert nearest_part(103)[0] is PARTS[100]
    assert nearest_part(75)[0] is PARTS[80]
    assert nearest_part("gfx950")[0] is PARTS["gfx942"]
    assert nearest_part(90) == (PARTS[90], "")
    assert "compute capability 103" in explain(512, 256, 256, 8, torch.bfloat16, 103)["note"]
    assert "gfx950" in explain(512, 256, 256, 8, torch.bfloat16, "gfx950")["note"]


def test_explain_shows_choice_model_and_floors():
    said = explain(*H100)
    assert said["part"] == "H100 SXM" and "not measured" in said["source"]
    assert set(said["path_seconds"]) == set(PATHS)
    assert said["config"]["path"] == min(PATHS, key=said["path_seconds"].__getitem__)
    # research/lora.md section 4, as a model: 696 us for the frozen forward and dx, 22.4 us to read x once.
    assert said["floors"]["frozen"]["seconds"] == pytest.approx(696e-6, rel=0.01)
    assert said["floors"]["down"]["seconds"] == pytest.approx(22.4e-6, rel=0.02)


def test_floors_count_bytes_and_flops():
    work = floors(8, 4, 2, 1, torch.float32, PARTS[80])
    assert work["bwd_da"]["bytes"] == 4 * (8 * 2 + 8 * 1 + 1 * 2)
    assert work["bwd_da"]["flops"] == 2 * 8 * 2 * 1


def test_force_nests_and_ends():
    before = pick_config(*H100)
    tile = Tile(64, 64, 64, 4, 2)
    with force(path="beta_one"):
        with force(gemm=tile):
            assert (pick_config(*H100).path, pick_config(*H100).gemm) == ("beta_one", tile)
            assert explain(*H100)["source"] == "forced"
        assert pick_config(*H100).gemm == before.gemm
    assert pick_config(*H100) == before


def test_force_refuses_what_is_not_there():
    with pytest.raises(ValueError, match="no such field of Config: .'tile'"), force(tile=1):
        pass
    with pytest.raises(ValueError, match="path is 'fast'"), force(path="fast"):
        pass


@pytest.mark.parametrize(
    "kernel, tile, reason",
    [
        ("gemm", Tile(96, 64, 64), "powers of two"),
        ("gemm", Tile(64, 64, 8), "powers of two"),
        ("gemm", Tile(128, 256, 64, 8, 4), "shared memory"),
        ("gemm", Tile(128, 256, 16, 4, 2), "registers"),
        ("gemm", Tile(64, 64, 64, 3), "num_warps"),
        ("down", Tile(64, 128), "span 0"),
        ("down", Tile(64, 128, span=200), "span 200"),
        ("bwd_da", Tile(32, 256, num_warps=4, span=64), "registers"),
    ],
)
def test_tiles_that_cannot_run_are_refused(kernel, tile, reason):
    assert reason in problem(kernel, tile, 128, 2, PARTS[90])


def _row(**changes) -> dict:
    config = pick_config(*H100)
    return {
        **asdict(config),
        **{"arch": 90, "dtype": "bfloat16", "M": 8192, "N": 4096, "K": 4096, "R": 16, "dropout": False},
        "measured": "H100, 2026-01-01",
        **changes,
    }


def _write(tmp_path, content) -> str:
    path = tmp_path / "rows.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_measured_rows_come_first_and_the_nearest_rows_win(tmp_path, monkeypatch):
    path = _write(tmp_path, [_row(path="beta_one"), _row(M=128, path="k_extension")])
    monkeypatch.setattr(configs, "TUNED", read_tuned(path))
    assert pick_config(6000, 4096, 4096, 16, torch.bfloat16, 90).path == "beta_one"
    small = pick_config(100, 4096, 4096, 16, torch.bfloat16, 90)
    assert isinstance(small, Config) and isinstance(small.gemm, Tile) and small.path == "k_extension"
    assert explain(*H100)["source"] == "measured: H100, 2026-01-01"
    assert pick_config(100, 4096, 4096, 32, torch.bfloat16, 90).measured is None
    assert pick_config(100, 4096, 4096, 16, torch.bfloat16, 90, dropout=True).measured is None


def test_a_mask_is_drawn_and_applied_in_its_own_tiles():
    plain, masked = (pick_config(*H100, dropout=dropout) for dropout in (False, True))
    assert masked.down != plain.down and masked.bwd_da != plain.bwd_da
    assert (masked.gemm, masked.bwd_dy, masked.path) == (plain.gemm, plain.bwd_dy, plain.path)
    assert pick_config(*H100[:-1], 80, dropout=True).down == pick_config(*H100[:-1], 80).down


@pytest.mark.parametrize(
    "content, message",
    [
        ("[{", "rows.json: "),
        ("{}", "expected a list of rows"),
        ([3], "row 0: keys are 3"),
        ([{"arch": 90}], "row 0: keys are"),
        ([_row(arch=91)], "unknown arch 91"),
        ([_row(path="fast")], "path 'fast'"),
        ([_row(dtype="float64")], "dtype 'float64'"),
        ([_row(measured=None)], "measured is None"),
        ([_row(gemm={"block": 3})], "gemm: "),
        ([_row(gemm=asdict(Tile(128, 256, 64, 8, 4)))], "gemm: needs about"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path, content, message):
    with pytest.raises(ValueError, match="PEFT_KERNELS_CONFIGS=") as error:
        read_tuned(_write(tmp_path, content))
    assert message in str(error.value)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        read_tuned(str(tmp_path / "absent.json"))
