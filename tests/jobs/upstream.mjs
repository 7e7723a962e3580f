// Xen Orchestra's own backup code as a peer: it cleans, merges and reads a remote.
//
//     node upstream.mjs DIRECTORY
//
// DIRECTORY is where the packages @xen-orchestra/fs and @xen-orchestra/backups resolve, as in
// any installation of Xen Orchestra from sources.  A request is one line of JSON on standard
// input, its answer one line on standard output; the end of the input ends the program.
//
//     {"do": "clean", "url": …, "vm": …, "stopAt"?: N, "torn"?: true}
//         clean with merge.  Instead of the Nth change of the remote it comes to a stop as by
//         a kill: neither this change nor any later one is made; with "torn", half of what
//         the Nth one writes to a VHD file or to the state of a merge is written.
//         → {"changes": how many there were, "stopped": …, "warnings": […], "error"?: …}
//     {"do": "read", "url": …, "vm": …}
//         list the backups and read each disk as for a restore
//         → {"backups": {id: {vdi: {"size": …, "blocks": {index: SHA-256}}}}}

import { createHash } from 'node:crypto'
import { createRequire } from 'node:module'
import { createInterface } from 'node:readline'
import { pathToFileURL } from 'node:url'

const resolve = createRequire(`${process.argv[2]}/package.json`).resolve
const load = name => import(pathToFileURL(resolve(name)))

// what their loggers print would mix with the answers
for (const name of ['log', 'info', 'debug', 'warn', 'error']) {
  console[name] = () => {}
}
const { getSyncedHandler } = await load('@xen-orchestra/fs')
const { RemoteAdapter } = await load('@xen-orchestra/backups/RemoteAdapter.mjs')

const CHANGES = {
  // each with the position of the data that it writes
  _writeFile: 1,
  _write: 1,
  _rename: undefined,
  _copy: undefined,
  _unlink: undefined,
  _rmdir: undefined,
  _mkdir: undefined,
  _truncate: undefined,
}

// it writes all its files in place; what else is cut stays so, since nobody knows what it said
const isMended = file => typeof file !== 'string' || file.endsWith('.merge.json')

class Stopped extends Error {}

function stopping(handler, stopAt, isTorn) {
  const seen = { changes: 0, stopped: false }
  for (const [name, dataAt] of Object.entries(CHANGES)) {
    const change = handler[name]
    handler[name] = async function (...args) {
      if (seen.stopped) {
        throw new Stopped(`${name} after the stop`)
      }
      seen.changes += 1
      if (seen.changes === stopAt) {
        seen.stopped = true
        if (isTorn && dataAt !== undefined && isMended(args[0])) {
          const data = Buffer.from(args[dataAt])
          args[dataAt] = data.subarray(0, data.length >> 1)
          await change.apply(this, args)
        }
        throw new Stopped(name)
      }
      return change.apply(this, args)
    }
  }
  return seen
}

async function clean(adapter, { vm, stopAt, torn }) {
  const warnings = []
  const seen = stopping(adapter.handler, stopAt, torn)
  let error
  try {
    await adapter.cleanVm(`/xo-vm-backups/${vm}`, {
      fixMetadata: true,
      remove: true,
      merge: true,
      lock: false,
      logInfo() {},
      logWarn(message, data) {
        warnings.push(`${message} ${data?.error ?? ''}`.trim())
      },
    })
  } catch (caught) {
    error = String(caught?.stack ?? caught)
  }
  return { ...seen, warnings, error }
}

async function read(adapter, { vm }) {
  const backups = {}
  for (const metadata of await adapter.listVmBackups(vm)) {
    const { disks, vdis } = await adapter.readIncrementalVmBackup(metadata)
    const found = (backups[metadata._filename] = {})
    for (const [reference, disk] of Object.entries(disks)) {
      const size = disk.getVirtualSize()
      const blocks = {}
      for await (const { index, data } of disk.diskBlocks()) {
        const used = data.subarray(0, Math.min(data.length, size - index * disk.getBlockSize()))
        blocks[index] = createHash('sha256').update(used).digest('hex')
      }
      found[vdis[reference].$snapshot_of$uuid ?? vdis[reference].uuid] = { size, blocks }
    }
  }
  return { backups }
}

for await (const line of createInterface({ input: process.stdin })) {
  const request = JSON.parse(line)
  let answer
  try {
    const { value: handler, dispose } = await getSyncedHandler({
      url: request.url,
      useVhdDirectory: request.url.includes('useVhdDirectory=true'),
    })
    try {
      const adapter = new RemoteAdapter(handler, { vhdDirectoryCompression: 'brotli' })
      answer = await { clean, read }[request.do](adapter, request)
    } finally {
      await dispose()
    }
  } catch (caught) {
    answer = { error: String(caught?.stack ?? caught) }
  }
  process.stdout.write(`${JSON.stringify(answer)}\n`)
}
