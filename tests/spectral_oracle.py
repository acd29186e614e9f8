"""The methods on whole matrices once more, as DESIGN has them, by numpy's SVD: no code in common with pcb_ray."""

from __future__ import annotations

import numpy as np


def svd(x, floor=None):
    """Of the present directions."""
    u, sigma, vt = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    floor = 2.0**-23 * max(x.shape) * sigma[0] if floor is None else floor
    k = int((sigma > floor).sum())
    return u[:, :k], sigma[:k], vt[:k].T


def polar(x):
    u, _, v = svd(x)
    return u @ v.T


def iso_c(tasks):
    s = sum(tasks)
    return svd(s)[1].mean() * polar(s) if s.any() else np.zeros(s.shape)


def iso_cts(tasks, common=0.8):
    s, n = sum(tasks), len(tasks)
    r = min(s.shape)
    d = min(r // n, round((r - int(common * r)) / n))
    k = r - n * d
    u_c, sigma_c, v_c = (part[..., :k] for part in svd(s))
    us, sigmas, vs = [], [], []
    for task in tasks:
        if not task.any() or not d:
            continue
        largest = np.linalg.svd(task.astype(np.float64), compute_uv=False)[0]
        u, sigma, v = svd(task - u_c @ (u_c.T @ task), 2.0**-23 * max(s.shape) * largest)
        us.append(u[:, :d]), sigmas.append(sigma[:d]), vs.append(v[:, :d])
    us.append(u_c), sigmas.append(sigma_c), vs.append(v_c)
    sigma = np.concatenate(sigmas)
    return sigma.mean() * polar(np.hstack(us)) @ polar(np.hstack(vs)).T if len(sigma) else np.zeros(s.shape)


def tsv_m(tasks):
    k = min(tasks[0].shape) // len(tasks)
    parts = [tuple(part[..., :k] for part in svd(task)) for task in tasks if task.any()]
    if not parts:
        return np.zeros(tasks[0].shape)
    u, sigma, v = (np.hstack(column) for column in zip(*parts, strict=True))
    return polar(u) @ np.diag(sigma) @ polar(v).T


def wudi(tasks, ridge=0.1):
    tasks = [task.astype(np.float64) for task in tasks if task.any()]
    if not tasks:
        return 0.0
    weights = [1.0 / np.square(task).sum() for task in tasks]
    h = sum(w * t.T @ t for w, t in zip(weights, tasks, strict=True))
    d = sum(w * t @ t.T @ t for w, t in zip(weights, tasks, strict=True))
    held = ridge * np.trace(h) / len(h)
    return (d + held * sum(tasks)) @ np.linalg.inv(h + held * np.eye(len(h)))


def svc(delta, tasks):
    u, sigma, v = svd(delta)
    tasks = [task.astype(np.float64) for task in tasks if task.any()]
    if not tasks:
        return delta
    new = []
    for k in range(len(sigma)):
        n, total = len(tasks), 0.0
        of_delta = sigma[k] * v[:, k]
        for task in tasks:
            of_task = u[:, k] @ task
            size = float(of_task @ of_task)
            total += max(1 / n, float(of_delta @ of_task) / size if size else 0.0)
        new.append(sigma[k] * n / total)
    return u @ np.diag(new) @ v.T
