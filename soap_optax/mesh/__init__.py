"""Meshes of devices: where arrays lie, and how refreshes are spread over devices."""
