"""Tables and figures from declarations: what is missing is run, every number is traceable."""
