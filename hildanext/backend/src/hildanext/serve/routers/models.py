"""GET /v1/models: the diffusion model, and its autoregressive parent as a second one."""

from typing import Annotated

from fastapi import APIRouter, Depends

from hildanext.decoding import EXACT
from hildanext.serve.errors import responses
from hildanext.serve.responses import ModelCard, ModelList
from hildanext.serve.service import Service, service_of

router = APIRouter(tags=["openai"])

TheService = Annotated[Service, Depends(service_of)]


@router.get("/v1/models", responses=responses())
async def models(service: TheService) -> ModelList:
    """What can be named as `model`."""
    names = [service.model, *([service.parent] if service.parent is not None else [])]
    return ModelList(data=[_card(service, name) for name in names])


@router.get("/v1/models/{name:path}", responses=responses(404))
async def model(name: str, service: TheService) -> ModelCard:
    """One of them."""
    return _card(service, name)


def _card(service: Service, name: str) -> ModelCard:
    parent = service.is_parent(name)
    facts = service.engine.facts
    return ModelCard(
        id=name,
        created=int(service.since),
        kind="autoregressive" if parent else "drafts" if facts.modes[0] in EXACT else "diffusion",
        max_model_len=facts.context,
        block_size=None if parent else facts.block_size,
    )
