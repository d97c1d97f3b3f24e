"""Along the layers of a graph: what left each of them, in a few rows."""

import numpy as np
from numpy.typing import NDArray

from quant.observe import Feeds, Observed
from quant.taps import exposed, layer_values, load
from runtime.session import InMemory

ROWS = 64  # of each layer: a record of 28 layers, 3584 wide, stays below 26 MB
AT_ONCE = 8  # layers that are in memory whole, before their rows are taken


def layer_rows(engine: Observed, name: str, feeds: Feeds) -> Feeds:
    """Run the graph `name` once for every few layers: layer -> [rows, width], evenly spaced, at most ROWS.

    Empty for a graph without layers. The session is opened for this and closed again.
    """
    graph = engine.manifest.graphs[name]
    model = load(engine.folder, graph)
    values = layer_values(model)
    if not values:
        return {}
    session = InMemory(*exposed(model, graph, [*values.values()]), engine.options)
    layers, found = [*values], {}
    for start in range(0, len(layers), AT_ONCE):
        some = layers[start : start + AT_ONCE]
        outputs = session.run_for([values[layer] for layer in some], feeds)
        found |= {layer: spaced(outputs[values[layer]]) for layer in some}
    return found


def spaced(array: np.ndarray) -> NDArray[np.float32]:
    """[..., width] -> at most ROWS of its rows, from the first to the last, as float32."""
    rows = array.reshape(-1, array.shape[-1])
    kept = np.unique(np.linspace(0, len(rows) - 1, min(ROWS, len(rows))).astype(int))
    return rows[kept].astype(np.float32)
