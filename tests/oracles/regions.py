"""What a network loses with a region: image by image, each hole solved by its equations."""

from oracles import oracle
from oracles.faithfulness import TIGHT, answer
from oracles.imputation import solved


def dropped(model, batch, masks, inside):
    found = {"there": [], "there/probability": []}
    for image, target, mask in zip(batch.x, batch.target, masks, strict=True):
        before = answer(model, image, target)
        after = answer(model, solved(image, mask if inside else ~mask), target)
        for part, one, other in zip(found.values(), before, after, strict=True):
            part.append(one - other)
    return found


@oracle("measures", "region_drop", tolerance=TIGHT)
def region_drop(model, batch, masks):
    return dropped(model, batch, masks, inside=True)


@oracle("measures", "complement_drop", tolerance=TIGHT)
def complement_drop(model, batch, masks):
    return dropped(model, batch, masks, inside=False)
