"""How a machine is run, behind one Protocol."""
