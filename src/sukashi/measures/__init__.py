"""What a cut did: measures give a number for each image or unit; importing this package registers them.

A measure is a function that asks for what it needs by the names of its parameters, the keys of `inputs.INPUTS` and the
providers of this registry, and has options as keywords. It returns a `Measurement`, or several by name, {"": the one
that goes by the measure's name, "part": ...}, never averaged. The fact `better` (higher, if it says nothing else) is
the way that is good. `inputs.measured` calls measures and makes once what several of them ask for.
"""

from sukashi.core.registry import Registry

measures = Registry("measure", "measures", better="higher")

from sukashi.measures import accuracy, faithfulness, maps, regions  # noqa: E402, F401
