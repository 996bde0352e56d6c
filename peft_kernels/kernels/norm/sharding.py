"""Which placements of DTensors norm's ops take, per mesh dimension: replicated, or rows apart."""

from ..._core.sharding import PARTIAL, REPLICATE


def _for(value, placement):
    return None if value is None else placement


def norm_fwd(x, residual, weight, bias, eps, rms, dtype) -> list:
    """Placements of (y, total, mean, rstd) and of the arguments; a row is whole, and so are weight and bias."""
    return [
        (
            [rows, REPLICATE if residual is None else rows, REPLICATE if rms else rows, rows],
            [rows, _for(residual, rows), _for(weight, REPLICATE), _for(bias, REPLICATE), None, None, None],
        )
        for rows in (REPLICATE, 0)
    ]


def norm_bwd(
    dy, dtotal, x, mean, rstd, weight, rms, need_dx, need_dweight, need_dbias, dtype, dx_dtype
) -> list:  # fmt: skip
    """Placements of (dx, dweight, dbias) and of the arguments. Rows apart, the sums are due; what is not needed is
    empty everywhere."""
    needed = need_dx, need_dweight, need_dbias
    found = []
    for rows, sums in ((REPLICATE, REPLICATE), (0, PARTIAL)):
        outputs = [p if n else REPLICATE for p, n in zip((rows, sums, sums), needed, strict=True)]
        stats = None if mean is None else REPLICATE if rms else rows  # RMSNorm's mean, if given, is empty
        given = [rows, _for(dtotal, rows), _for(x, rows), stats, _for(rstd, rows), _for(weight, REPLICATE)]
        found.append((outputs, given + [None] * 6))
    return found
