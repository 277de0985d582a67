"""Order policies of unmask: how they are trained, evaluated and run from the command line."""
