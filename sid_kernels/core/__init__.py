"""What no operation owns: autograd glue and shared kernel mathematics."""
