from typing import Any


async def changed_blocks(x: Any, a: Any, b: Any) -> Any:
    raise NotImplementedError


async def enable_cbt(x: Any, a: Any) -> None:
    raise NotImplementedError


async def destroy_data(x: Any, a: Any) -> None:
    raise NotImplementedError
