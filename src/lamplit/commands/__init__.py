"""Commands of the command line, those that one module cannot hold: parse, one library call, print."""
