"""What a plan has to know about a layer, from the layer."""

from __future__ import annotations

from .layer import Layer
from .plan import LayerSpec


def spec_of(layer: Layer, *, used: bool) -> LayerSpec:
    """Return a layer's sizes.

    Args:
        layer: the layer, as it was measured.
        used: forwards need it on the compute device.
    """
    if not used:
        return LayerSpec(
            name=layer.name,
            stream_bytes=0,
            copy_bytes=0,
            can_stay=False,
            host_bytes=layer.host_bytes,
        )
    return LayerSpec(
        name=layer.name,
        stream_bytes=layer.stream_bytes,
        copy_bytes=layer.copy_bytes,
        decoded_bytes=layer.decoded_bytes,
        cast_bytes=layer.cast_bytes,
        resident_bytes=layer.resident_bytes,
        resident_cast_bytes=layer.resident_cast_bytes,
        coded_bytes=layer.coded_bytes,
        transit_bytes=0 if layer.is_kept_as_copied else layer.stream_bytes,
        held=layer.held,
        can_stay=layer.can_stay,
        disk_bytes=layer.disk_bytes,
        host_bytes=layer.host_bytes,
    )
