"""Which of humming's tiles are tried for one M: its heuristic's, those that it chooses for half and
twice as many rows, and a handful more. Its own choice for int8 spills from 2048 rows on, and reads
a weight that L2 cannot hold again for each tile of rows.
"""

from humming.tune import get_heuristics_config
from humming.tune.raster import raster_group_m_for_config

# warp-specialized wgmma with 8-bit activations: (block of M, N, warp's N, what else)
MANY_ROWS = (
    (128, 128, 16, {"wgmma_split_issue_wait": True}),
    (128, 128, 16, {"wgmma_split_issue_wait": True, "multi_cast_size_a": 2}),
    (144, 128, 16, {"wgmma_split_issue_wait": True}),
    (160, 128, 16, {}),
    (192, 128, 16, {}),
    (96, 256, 32, {}),
)


def few_rows(m):
    rows = -(-m // 16) * 16 if m > 8 else 8
    return (
        (rows, 128, 16, {"wgmma_split_issue_wait": True, "use_stream_k": True}),
        (rows, 128, 32, {"use_stream_k": True}),
        (rows, 256, 32, {"use_stream_k": True}),
        (rows, 128, 16, {"use_stream_k": True, "num_ctas_per_sm": 2}),
    )


def with_raster(layer, tile):
    """Walks as many tiles of rows together as L2 holds, as humming's heuristic does where it does
    not say: of a weight that L2 cannot hold, it matters more than the tile."""
    group = raster_group_m_for_config(layer, tile["block_shape"], tile.get("multi_cast_size_a", 1))
    return {**tile, "raster_group_m": group}


def tile(rows, columns, warp_columns, more):
    return {
        "mma_type": "wgmma", "block_shape": (rows, columns, 128),
        "warp_shape": (rows, warp_columns, 128), "num_stages": 4, "num_ctas_per_sm": 1,
        "use_tma": True, "use_warp_spec": True, "use_stream_k": False,
        "smem_reuse_mode": "all_stages" if "use_stream_k" in more else "none",
        "producer_stage_unroll": None if "use_stream_k" in more else 2, **more}


def name_of(tile):
    text = "x".join(map(str, tile["block_shape"])) + "/" + str(tile["warp_shape"][1])
    for key, short in (("use_stream_k", "stream-k"), ("wgmma_split_issue_wait", "split")):
        if tile.get(key):
            text += " " + short
    for key, short in (("num_ctas_per_sm", "blocks"), ("multi_cast_size_a", "cluster")):
        if tile.get(key, 1) > 1:
            text += f" {tile[key]} {short}"
    if tile.get("raster_group_m", 1) > 1:
        text += f" raster {tile['raster_group_m']}"
    return text if tile["mma_type"] == "wgmma" else text + " " + tile["mma_type"]


def tiles_for(layer, m):
    """{name: tile}; the first is humming's own."""
    own = [get_heuristics_config(layer, shape_m=rows)
           for rows in dict.fromkeys((m, max(1, m // 2), 2 * m))]
    tiles = own + [with_raster(layer, values) for values in own]
    if layer.a_dtype.num_bits == 8:
        shapes = few_rows(m) if m <= 64 else MANY_ROWS
        if 64 < m <= 512:
            shapes += few_rows(64)
        tiles += [with_raster(layer, tile(*shape)) for shape in shapes]
    named = {}
    for number, values in enumerate(tiles):
        name = name_of(values) + (" (its own)" if number == 0 else "")
        if values in named.values():
            continue
        while name in named:  # what a name does not say is different
            name += "'"
        named[name] = values
    return named
