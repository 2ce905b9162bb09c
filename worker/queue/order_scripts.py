"""Lua scripts of `worker.queue.order`: the order in which workers will take the waiting jobs.

It follows from the callers' tags and the costs of their jobs, as in the script `TAKE` in
`worker.queue.line_scripts`. Callers and jobs are read only as far as they are asked for.

KEYS of all: those of `worker.queue.line_scripts`. ARGV of all: prefix of the keys of job records,
that of subscriptions, one in how many jobs is a batch job, priority, caller, id of the job before
which the order ends.
"""

from worker.queue.line_scripts import COMMON

_ORDER = (
    COMMON
    + """
local job_prefix, interest_prefix, every, priority, place, id = unpack(ARGV)
local now = time()

local function is_less(a, b)  -- bytes, as in sorted sets; Lua compares by the locale
  for i = 1, math.min(#a, #b) do
    local x, y = string.byte(a, i), string.byte(b, i)
    if x ~= y then return x < y end
  end
  return #a < #b
end
local function is_before(a, b)
  if a.tag ~= b.tag then return a.tag < b.tag end
  return is_less(a.caller, b.caller)
end
local function push(heap, entry)
  local i = #heap + 1
  while i > 1 do
    local parent = math.floor(i / 2)
    if not is_before(entry, heap[parent]) then break end
    heap[i], i = heap[parent], parent
  end
  heap[i] = entry
end
local function pop(heap)
  local first, last = heap[1], table.remove(heap)
  local i, child = 1, 2
  while child <= #heap do
    if child < #heap and is_before(heap[child + 1], heap[child]) then child = child + 1 end
    if not is_before(heap[child], last) then break end
    heap[i], i, child = heap[child], child, 2 * child
  end
  if first ~= last then heap[i] = last end
  return first
end

local function advance(entry)
  entry.at = entry.at + 1
  if entry.at > #entry.ids then
    entry.ids = redis.call('lrange', entry.key, entry.read, entry.read + entry.size - 1)
    entry.read, entry.size, entry.at = entry.read + #entry.ids, 2 * entry.size, 1
  end
  entry.id = entry.ids[entry.at]
  if not entry.id and entry.is_place then entry.id, entry.is_place = '', false end
  return entry.id
end
local function begin(heap, kind, caller, tag)
  local entry = {
    caller = caller, key = list(kind, caller), ids = {}, at = 0, read = 0, size = 16,
    is_place = id == '' and kind == priority and caller == place,
  }
  if not advance(entry) then return end
  if entry.id == '' then  -- begins to wait: as in `join`
    tag = math.max(virtual(kind), tag, score(line .. ':left:' .. kind, caller) or tag)
  end
  entry.tag = tag
  push(heap, entry)
end

local function ordered(kind)
  local key, heap, found, at, read = line .. ':' .. kind, {}, {}, 1, 0
  local has_base = kind == 'interactive' and redis.call('exists', base) == 1
  if has_base and not score(key, '') then begin(heap, kind, '', virtual(kind)) end
  local waits = score(key, place) or (has_base and place == '')
  if id == '' and kind == priority and not waits then begin(heap, kind, place, virtual(kind)) end
  local function peek()
    if at > #found and read then
      found, at = redis.call('zrange', key, read, read + 31, 'withscores'), 1
      read = #found == 64 and read + 32  -- false after the last one
    end
    return found[at], tonumber(found[at + 1] or '')
  end
  return function()
    local caller, tag = peek()
    while caller and (not heap[1] or tag <= heap[1].tag) do
      begin(heap, kind, caller, tag)
      at = at + 2
      caller, tag = peek()
    end
    if not heap[1] then return end
    local entry = pop(heap)
    local next_id, work = entry.id, '0'
    if next_id ~= '' then
      local fields = redis.call('hmget', job_prefix .. next_id, 'work', 'weight')
      work = fields[1] or work
      entry.tag = entry.tag + (tonumber(fields[1] or '') or 1) / (tonumber(fields[2] or '') or 1)
      if advance(entry) then push(heap, entry) end
    end
    return next_id, work
  end
end
"""
)

FIRST = (
    _ORDER
    + """
local next_job, ids = ordered(priority), {}
while #ids < tonumber(ARGV[7]) do
  local next_id = next_job()
  if not next_id then break end
  ids[#ids + 1] = next_id
end
return table.concat(ids, ' ')
"""
)
"""The ids of the first jobs of a priority, with spaces. More ARGV: how many."""

_AHEAD = (
    _ORDER
    + """
local function ahead()
  if id ~= '' and not redis.call('lpos', list(priority, place), id) then return false end
  local heads, nexts = {}, {interactive = ordered('interactive'), batch = ordered('batch')}
  for kind, next_job in pairs(nexts) do heads[kind] = {next_job()} end
  local passed, jobs = tonumber(redis.call('hget', line, 'passed') or '0'), {}
  while true do
    local urgent, patient = heads.interactive[1], heads.batch[1]
    local kind = 'interactive'
    if patient and (not urgent or passed >= every - 1) then kind = 'batch' end
    local next_id, work = unpack(heads[kind])
    if not next_id or next_id == id then return table.concat(jobs, ' ') end
    if redis.call('zcount', interest_prefix .. next_id, now, '+inf') == 0 then work = '' end
    jobs[#jobs + 1] = next_id .. ':' .. work
    if kind == 'batch' then passed = 0 elseif patient then passed = passed + 1 end
    heads[kind] = {nexts[kind]()}
  end
end
"""
)

OUTLOOK = (
    _AHEAD
    + """
local sums, leases, worker_prefix, lease_s = ARGV[7], ARGV[8], ARGV[9], ARGV[10]
local workers, running = {}, {}
for _, name in ipairs(redis.call('zrangebyscore', ARGV[11], now - lease_s, '+inf')) do
  workers[#workers + 1] = {name, redis.call('hexists', worker_prefix .. name, 'drained')}
end
for _, job in ipairs(redis.call('zrange', leases, 0, -1)) do
  running[#running + 1] =
    redis.call('hmget', job_prefix .. job, 'owner', 'worker', 'work', 'step', 'total')
end
return {ahead(), redis.call('hgetall', sums), workers, running}
"""
)
"""All that predictions need: the jobs before a job, the hash of sums, live workers with 1 if they
are drained, and owner, worker, work, step and total of the running jobs.

The jobs before it are `ID:WORK` with spaces, with an empty work if a job has no subscribers;
nothing if the job does not wait. For an empty id, they are those before a job that the caller
queued now.

More ARGV: keys of the sums and of the running jobs, prefix of workers' records, seconds for which a
worker lives without a heartbeat, key of the live workers.
"""
