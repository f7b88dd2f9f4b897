"""Tenants: whose a workspace is, and under which name the store keeps it."""

from __future__ import annotations

from typing import NewType

from deltasync.core.names import WorkspaceName, parse_workspace

Tenant = NewType("Tenant", str)
"""A tenant's name; '' is the default tenant, which needs none."""

DEFAULT = Tenant("")
DEFAULT_TEXT = "default"
"""What people read and write for the default tenant."""
FOLDER = "tenants"


def parse_tenant(text: str) -> Tenant:
    """Return the tenant that a text names, or raise NameRefused; the rules are those of a workspace's name."""
    return DEFAULT if text == DEFAULT_TEXT else Tenant(parse_workspace(text))


def tenant_text(tenant: Tenant) -> str:
    """Return what people read for a tenant."""
    return tenant or DEFAULT_TEXT


def qualified(tenant: Tenant, name: WorkspaceName) -> WorkspaceName:
    """Return the name under which the store keeps a tenant's workspace; no tenant can write another's (spec ST-100)."""
    return WorkspaceName(f"{tenant}/{name}") if tenant else name


def tenant_of(workspace: str) -> Tenant:
    """Return whose a workspace is, by the name under which the store keeps it."""
    return Tenant(workspace.rpartition("/")[0])


def own_name(workspace: str) -> str:
    """Return what its tenant calls a workspace."""
    return workspace.rpartition("/")[2]


def folder_of(workspace: str, kind: str = "workspaces") -> str:
    """Return where below DATA the folder of a workspace is. kind: what is in it, `workspaces` or `bundles`."""
    tenant = tenant_of(workspace)
    home = f"{FOLDER}/{tenant}/{kind}" if tenant else kind
    return f"{home}/{own_name(workspace)}"
