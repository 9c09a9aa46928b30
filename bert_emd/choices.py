"""What some options of the method can be, apart from the code that acts on them: --help needs the names, not torch."""

# How the cost attention turns unit costs into layer weights (bert_emd/layer_transport.py says what each does).
WEIGHT_UPDATES = ("normalize", "softmax", "softmax2", "none")
# Of the transport problem.
SOLVERS = ("pyemd", "pot")
