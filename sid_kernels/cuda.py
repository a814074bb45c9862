"""The CUDA backend (placeholder by the lead so that the package imports; helper replaces it, using native.pack)."""

def unavailable():
    return "not built yet"
