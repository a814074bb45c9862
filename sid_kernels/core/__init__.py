"""What no operation owns: loss options, argument checks, autograd glue, and which backend can be used here."""
