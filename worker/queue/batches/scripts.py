"""Lua scripts of batches, `worker.queue.batches.store`, which describes their keys.

KEYS of all: record, states, active items, problems, pages, batches, counters. The scripts of a step
get the token of the lease as ARGV[1], and return nil if another process has the lease by now.
"""

LEASE = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
while true do
  local id = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, 1)[1]
  if not id then return nil end
  if redis.call('EXISTS', ARGV[3] .. id) == 1 then
    redis.call('HSET', ARGV[3] .. id, 'lease', ARGV[1])
    redis.call('ZADD', KEYS[1], now + ARGV[2], id)
    return id
  end
  redis.call('ZREM', KEYS[1], id)
end
"""
"""Take the lease of a batch that is due. KEYS: batches. ARGV: token, seconds, prefix of records."""

_LEASED = """
if redis.call('HGET', KEYS[1], 'lease') ~= ARGV[1] then return nil end
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
"""

DUE_IN = (
    _LEASED
    + """
redis.call('ZADD', KEYS[6], 'XX', now + ARGV[2], ARGV[3])
return 1
"""
)
"""Make the batch due in so many seconds. More ARGV: seconds, id."""

CLAIM = (
    _LEASED
    + """
local states = redis.call('GET', KEYS[2]) or ''
local room = math.min(ARGV[2], ARGV[3] - redis.call('HLEN', KEYS[3]))
local claimed, at = {}, string.find(states, 'w', 1, true)
while at and #claimed < room do
  redis.call('SETRANGE', KEYS[2], at - 1, 'q')
  redis.call('HSET', KEYS[3], at - 1, '{}')
  claimed[#claimed + 1] = at - 1
  at = string.find(states, 'w', at + 1, true)
end
return claimed
"""
)
"""Make waiting items active; returns their numbers. More ARGV: how many, most active ones."""

NOTE = (
    _LEASED
    + """
if redis.call('HEXISTS', KEYS[3], ARGV[2]) == 0 then return 0 end
return 1 + redis.call('HSET', KEYS[3], ARGV[2], ARGV[3])
"""
)
"""Store what is known of an item; 0 if it is not active any more. More ARGV: number, value."""

SETTLE = (
    _LEASED
    + """
local names = {s = 'succeeded', k = 'skipped', f = 'failed', c = 'canceled'}
local again = redis.call('HGET', KEYS[1], 'canceled') == '1' and 'c' or 'w'
for _, change in ipairs(cjson.decode(ARGV[2])) do
  local number, state, problem = change[1], change[2] == 'w' and again or change[2], change[3]
  local former = redis.call('GETRANGE', KEYS[2], number, number)
  if former == 'q' or former == 'r' then
    redis.call('SETRANGE', KEYS[2], number, state)
    if state == 'w' or names[state] then redis.call('HDEL', KEYS[3], number) end
    if names[state] then
      redis.call('HSET', KEYS[1], 'progressed', now)
      redis.call('HINCRBYFLOAT', KEYS[7], ARGV[3] .. names[state], 1)
    end
    if problem ~= '' then redis.call('HSET', KEYS[4], number, problem) end
  end
end
return 1
"""
)
"""Change the states of active items. More ARGV: list of number, state and problem, JSON; prefix of
the counters. Items that have ended are left alone, so a repeated call changes nothing."""

EXTEND = (
    _LEASED
    + """
if redis.call('STRLEN', KEYS[2]) ~= tonumber(ARGV[2]) then return nil end
if redis.call('HGET', KEYS[1], 'canceled') == '1' then return 0 end
if ARGV[3] ~= '0' then redis.call('APPEND', KEYS[2], string.rep('w', ARGV[3])) end
for i = 6, #ARGV, 2 do redis.call('HSET', KEYS[5], ARGV[i], ARGV[i + 1]) end
redis.call('HSET', KEYS[1], 'after', ARGV[4], 'listed', ARGV[5])
return 1
"""
)
"""Add listed items. More ARGV: former number of items, number of new ones, last key, 1 at the end
of the listing; then numbers of pages and pages."""

CANCEL = """
if redis.call('HGET', KEYS[1], 'ended') ~= '0' then return 0 end
local states = string.gsub(redis.call('GET', KEYS[2]) or '', 'w', 'c')
redis.call('SET', KEYS[2], states, 'KEEPTTL')
redis.call('HSET', KEYS[1], 'canceled', 1, 'listed', 1)
return 1
"""
"""Cancel all waiting items, and end the listing; 0 if the batch has ended."""

RETRY = """
local states, failed = string.gsub(redis.call('GET', KEYS[2]) or '', 'f', 'w')
local refused = redis.call('HGET', KEYS[1], 'problem') ~= ''
if failed == 0 and not refused then return 0 end
local now = redis.call('TIME')[1]
redis.call('SET', KEYS[2], states, 'KEEPTTL')
redis.call('DEL', KEYS[4])
redis.call('HSET', KEYS[1], 'ended', 0, 'canceled', 0, 'problem', '', 'progressed', now)
if refused then redis.call('HSET', KEYS[1], 'listed', 0) end
redis.call('ZADD', KEYS[6], 'NX', now, ARGV[1])
return 1
"""
"""Let failed items wait again, and a failed listing go on; 0 if nothing has failed. ARGV: id."""
