"""The simulated TEE: the only place that can issue simulated evidence.

Real quote format, real collateral format, a local root instead of Intel's. Nothing here protects anything: whoever
holds the directory can quote any measurement. Production parts never import this package.
"""

from stip_stack.tee.collateral import Faults
from stip_stack.tee.platform import SimulatedPlatform, SimulatedProvider, load_provider

__all__ = ["Faults", "SimulatedPlatform", "SimulatedProvider", "load_provider"]
