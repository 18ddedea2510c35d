"""Refreshes of eigenbases: by which method, how many together, and when."""

from soap_optax.refresh._methods import METHODS as METHODS
