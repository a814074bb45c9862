"""How a network learns: the SID step and the methods it is compared with."""
