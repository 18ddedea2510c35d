"""SOAP for JAX: optax transformations in the eigenbasis of Shampoo's preconditioner."""

from soap_optax._diagnostics import Diagnostics as Diagnostics
from soap_optax._diagnostics import diagnostics as diagnostics
from soap_optax._eigenbasis import in_eigenbasis as in_eigenbasis
from soap_optax._hyperball import HyperballState as HyperballState
from soap_optax._hyperball import hyperball as hyperball
from soap_optax._shampoo import ShampooState as ShampooState
from soap_optax._shampoo import scale_by_shampoo as scale_by_shampoo
from soap_optax._shampoo import shampoo as shampoo
from soap_optax._soap import scale_by_soap as scale_by_soap
from soap_optax._soap import soap as soap
from soap_optax._state import EigenbasisState as EigenbasisState
from soap_optax.mesh._placement import state_sharding as state_sharding
from soap_optax.parameters._layout import DimensionNumbers as DimensionNumbers
from soap_optax.parameters._matrices import matrices as matrices
from soap_optax.refresh._methods import QR as QR
from soap_optax.refresh._methods import CholeskyQR as CholeskyQR
from soap_optax.refresh._methods import Eigh as Eigh
from soap_optax.refresh._methods import Refreshed as Refreshed
from soap_optax.refresh._methods import RefreshMethod as RefreshMethod
from soap_optax.refresh._methods import RefreshRequest as RefreshRequest

__version__ = "0.1.0"
