"""Lua scripts of the outbox, `worker.queue.outbox`, which describes their keys."""

REGISTER = """
if redis.call('SISMEMBER', KEYS[1], ARGV[1] .. ARGV[2]) == 0 then
  local count = 0
  for _, entry in ipairs(redis.call('SMEMBERS', KEYS[1])) do
    if string.match(entry, '#.*$') == ARGV[2] then count = count + 1 end
  end
  if count >= tonumber(ARGV[3]) then return 0 end
  redis.call('SADD', KEYS[1], ARGV[1] .. ARGV[2])
end
redis.call('EXPIRE', KEYS[1], ARGV[4])
return 1
"""
"""Register a URL. KEYS: URLs of the job. ARGV: URL, `#` and caller, limit, TTL."""

ADD = """
local time = redis.call('TIME')
for _, entry in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local id = 'msg_' .. ARGV[2] .. string.sub(redis.sha1hex(entry), 1, 16)
  local key = ARGV[1] .. id
  local url, caller = string.match(entry, '^([^#]*)#?(.*)$')
  redis.call('HSET', key, 'url', url, 'body', ARGV[3], 'job', ARGV[4], 'attempts', 0)
  redis.call('HSET', key, 'caller', caller)
  redis.call('EXPIRE', key, ARGV[5])
  redis.call('ZADD', KEYS[2], time[1] + time[2] / 1e6, id)
  redis.call('EXPIRE', KEYS[2], ARGV[5])
end
redis.call('DEL', KEYS[1])
"""
"""Add messages to the inbox. KEYS: URLs of the job, inbox. ARGV: prefix of messages, random id,
body, job, TTL."""

_LINES = """
local inbox, callers = KEYS[1], KEYS[2]
local messages, hosts_of, lines, ttl = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6

local function line_of(id)
  local found = redis.call('HMGET', messages .. id, 'url', 'caller')
  if not found[1] then return nil end
  local host = string.match(found[1], '^%a+://([^/?#]*)') or ''
  return found[2] or '', string.lower(host)
end

local function head(key)
  return tonumber(redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')[2])
end

local function put(id, due)
  local caller, host = line_of(id)
  if not caller then return end
  local line = lines .. caller .. ' ' .. host
  redis.call('ZADD', line, due, id)
  redis.call('ZADD', hosts_of .. caller, 'LT', due, host)
  redis.call('ZADD', callers, 'LT', due, caller)
  for _, key in ipairs({line, hosts_of .. caller, callers}) do redis.call('EXPIRE', key, ttl) end
end

local function remove(caller, host, id)
  local line = lines .. caller .. ' ' .. host
  redis.call('ZREM', line, id)
  if redis.call('EXISTS', line) == 0 then redis.call('ZREM', hosts_of .. caller, host) end
  if redis.call('EXISTS', hosts_of .. caller) == 0 then redis.call('ZREM', callers, caller) end
end
"""
"""Functions of the following scripts. KEYS: inbox, callers. ARGV: prefixes of messages, of callers'
hosts and of lines; TTL."""

CLAIM = (
    _LINES
    + """
local full, limit = {}, 1
for _, argument in ipairs({ARGV[6], ARGV[7]}) do
  for _, name in ipairs(cjson.decode(argument)) do full[name], limit = true, limit + 1 end
end

local function first_due(key, prefix)
  for _, name in ipairs(redis.call('ZRANGEBYSCORE', key, '-inf', now, 'LIMIT', 0, limit)) do
    if not full[prefix .. name] then return name end
  end
end

local new = redis.call('ZRANGE', inbox, 0, ARGV[8] - 1, 'WITHSCORES')
for i = 1, #new, 2 do
  put(new[i], tonumber(new[i + 1]))
  redis.call('ZREM', inbox, new[i])
end
while true do
  local caller = first_due(callers, '')
  if not caller then return nil end
  local hosts = hosts_of .. caller
  local host = first_due(hosts, caller .. ' ')
  local at = head(hosts)
  if not at then
    redis.call('ZREM', callers, caller)
  elseif at > now then
    redis.call('ZADD', callers, at, caller)
  elseif not host then
    full[caller], limit = true, limit + 1
  else
    local line = lines .. caller .. ' ' .. host
    local id = redis.call('ZRANGEBYSCORE', line, '-inf', now, 'LIMIT', 0, 1)[1]
    if not id then
      local later = head(line)
      if later then redis.call('ZADD', hosts, later, host) else remove(caller, host, '') end
    elseif not line_of(id) then
      remove(caller, host, id)
    else
      redis.call('ZADD', line, now + ARGV[5], id)
      redis.call('ZADD', hosts, math.max(head(line), now), host)
      redis.call('ZADD', callers, math.max(head(hosts), now), caller)
      local attempts = redis.call('HINCRBY', messages .. id, 'attempts', 1)
      local found = redis.call('HMGET', messages .. id, 'url', 'body', 'job')
      return {id, found[1], found[2], found[3], tostring(attempts), caller, host}
    end
  end
end
"""
)
"""Distribute new messages, then claim the one that is due in the line whose turn it is. After a
claim, caller and host have their next turn after all others that are due. Outdated times of callers
and hosts are corrected on the way. More ARGV: lease, full callers, full lines (JSON), number of new
messages."""

SETTLE = (
    _LINES
    + """
local id, key = ARGV[5], messages .. ARGV[5]
if redis.call('HGET', key, 'attempts') ~= ARGV[6] then return 0 end
if ARGV[7] ~= '' then
  redis.call('EXPIRE', key, ttl)
  put(id, now + ARGV[7])
  return 1
end
local caller, host = line_of(id)
remove(caller, host, id)
redis.call('ZREM', inbox, id)
redis.call('DEL', key)
if ARGV[8] ~= '' then
  redis.call('LPUSH', KEYS[3], ARGV[8])
  redis.call('LTRIM', KEYS[3], 0, ARGV[9] - 1)
  redis.call('EXPIRE', KEYS[3], ARGV[10])
end
return 1
"""
)
"""Record the result of an attempt, unless another sender has claimed the message: put it back, or
remove it and add a dead letter. More KEYS: dead letters. More ARGV: message, its attempts, seconds
until it is due again or empty, dead letter or empty, number and TTL of dead letters."""
