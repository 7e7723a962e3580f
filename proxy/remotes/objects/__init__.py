"""Remotes in object stores.

:mod:`~proxy.remotes.objects.store` says what a store can do; one module or package for each
kind of store speaks its protocol, and nothing above knows which one it is.
"""
